"""torchaccel: a torch.compile backend for long-context transformers, exact by default and lossy only when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchaccel.api import compile, explain, report, tune
    from torchaccel.calibration.calibrate import calibrate
    from torchaccel.calibration.plan import CalibrationPlan, read_plan
    from torchaccel.evaluation.evaluation import evaluate
    from torchaccel.prediction import predict
    from torchaccel.runtime.kv import kv_bytes, to_dense

__all__ = [
    "CalibrationPlan",
    "calibrate",
    "compile",
    "evaluate",
    "explain",
    "kv_bytes",
    "predict",
    "read_plan",
    "report",
    "to_dense",
    "tune",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that importing the package costs nothing and touches no device.
    if name in ("compile", "explain", "report", "tune"):
        from torchaccel import api

        return getattr(api, name)
    if name == "calibrate":
        from torchaccel.calibration.calibrate import calibrate

        return calibrate
    if name in ("CalibrationPlan", "read_plan"):
        from torchaccel.calibration import plan

        return getattr(plan, name)
    if name == "evaluate":
        from torchaccel.evaluation.evaluation import evaluate

        return evaluate
    if name == "predict":
        from torchaccel.prediction import predict

        return predict
    if name in ("kv_bytes", "to_dense"):
        from torchaccel.runtime import kv

        return getattr(kv, name)
    raise AttributeError(f"module 'torchaccel' has no attribute {name!r}")
