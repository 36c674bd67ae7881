"""The model as it is, without any compiler."""

from __future__ import annotations

from ..runner import Runner


class Eager(Runner):
    """Plain PyTorch: what every speed-up and every error is held against."""
