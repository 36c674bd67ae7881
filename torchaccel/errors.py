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


class PeerError(TorchaccelError, RuntimeError):
    """A process that runs a baseline in an environment of its own hung, died or answered nonsense."""
