"""``torchaccel.predict``: options in the user's words, turned into what the cost model knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .methods import FAMILIES
from .options import resolve

if TYPE_CHECKING:
    from torch import device as Device

    from .cost.facts import DeviceFacts
    from .cost.predict import Prediction


def predict(
    model: Any, inputs: Any, options: Mapping[str, Any] | None = None, device: str | Device | DeviceFacts = "cpu"
) -> Prediction:
    """Predict time and memory of ``model`` with ``options`` on ``device``, which need not be present.

    model: a Hugging Face model, or its configuration. inputs: token ids ``[B, S]``, a mapping with "input_ids" or with
    "batch" and "context", or a number of tokens. device: "h200" and others of ``torchaccel.cost.devices``, or "cpu" and
    "cuda" for this machine's, which are measured first. Raises ``ValueError`` for what is unknown or not modelled.
    """
    from .cost.predict import predict_model

    asked = resolve(options).requested()
    return predict_model(model, inputs, {name: asked[name] for name in FAMILIES if name in asked}, device)
