"""``torchaccel.calibrate``: a plan for a method, from a model and text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from torchaccel import __version__
from torchaccel.errors import CalibrationError, OptionsError
from torchaccel.methods import FAMILIES
from torchaccel.passes.base import Method

from .calibrator import Batch
from .collect import Report, TextCollector
from .identity import ModelIdentity, weights_of
from .plan import CalibrationPlan


def calibrate(
    model: nn.Module,
    method: str,
    batches: Iterable[Tensor | Mapping[str, Any]],
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    progress: Report | None = None,
) -> CalibrationPlan:
    """Calibrate ``method`` for ``model``; the plan goes into the method's options, or into a file with ``plan.save``.

    batches: token ids ``[B, S]``, or keyword arguments of the model with an ``attention_mask`` where rows are padded.
    options: the method's. seed: of whatever is random. progress: told how many steps of how many are done. Raises
    ``CalibrationError`` for a method without calibration and for no text, ``OptionsError`` for impossible options.
    """
    known = calibrated_method(method)
    assert known.calibrator is not None
    chosen = _options(known, options or {})
    given = [_arguments(batch) for batch in batches]
    if not given:
        raise CalibrationError(f"asked to calibrate {known.name!r} with no text at all; give at least one batch of ids")
    training = model.training
    model.eval()
    try:
        collector = TextCollector(model, given, progress)
        tensors = known.calibrator(chosen, seed).run(collector)
    finally:
        model.train(training)
    identity = ModelIdentity(type(model).__name__, collector.sites, weights_of(model))
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    asked = chosen.model_dump(mode="json", exclude={"plan"})
    return CalibrationPlan(known.name, asked, identity, kept, __version__)


def calibrated_method(name: str) -> type[Method]:
    """The method of this name or alias that is calibrated; raises ``CalibrationError`` for any other name.

    Methods of one name in several families share their plans: it is the first of them.
    """
    calibrated = [method for methods in FAMILIES.values() for method in methods if method.calibrator is not None]
    for method in calibrated:
        if name in (method.name, *method.aliases):
            return method
    known = ", ".join(dict.fromkeys(method.name for method in calibrated))
    raise CalibrationError(f"asked to calibrate {name!r}; the methods that are calibrated are {known or 'none so far'}")


def _options(method: type[Method], given: Mapping[str, Any]) -> Any:
    if "plan" in given:
        raise OptionsError("asked to calibrate with a plan; leave the option plan out, it is what calibrating makes")
    try:
        return method.Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise OptionsError(f"{method.name}.{key}: {first['msg']}; found {first['input']!r}") from error


def _arguments(batch: Tensor | Mapping[str, Any]) -> Batch:
    return {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
