"""Every error torchaccel raises on purpose: what was asked, what was found, what to do next."""

from __future__ import annotations


class TorchaccelError(Exception):
    """Base of all errors of this package."""


class OptionsError(TorchaccelError, ValueError):
    """An option name or value that torchaccel does not know."""


class DeclinedError(TorchaccelError, RuntimeError):
    """With ``strict=True``: a requested optimisation could not be applied."""


class EvictedTokensError(TorchaccelError, RuntimeError):
    """A compressed KV cache was read as if it still held every token."""


class OffloadError(TorchaccelError, RuntimeError):
    """A KV cache cannot be kept where it was asked to be."""


class SharedPrefixError(TorchaccelError, RuntimeError):
    """The keys and the values of a layer share different prefixes."""


class PeerError(TorchaccelError, RuntimeError):
    """A process that runs a baseline in an environment of its own hung, died or answered nonsense."""


class TuningError(TorchaccelError, RuntimeError):
    """Candidates cannot be measured: the process that measures does not start, or nothing is there to measure."""


class CalibrationError(TorchaccelError, ValueError):
    """A calibration plan that is missing, damaged, or of another model or method; or a method that has none."""


class CacheMissError(TorchaccelError, LookupError):
    """With ``TORCHACCEL_ASSERT_CACHE_HIT=1``: the tuning cache holds nothing for what is being compiled."""


class BundleError(TorchaccelError, ValueError):
    """A bundle that is no bundle, is damaged, or may not be used."""


class CacheWarning(UserWarning):
    """The tuning cache or a bundle cannot be used, and torchaccel goes on without it."""
