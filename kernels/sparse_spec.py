"""The frozen descriptions of few-row kernels that read a part of their weights: of an MLP, and of a linear layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from .fused_spec import ActivationName


@dataclass(frozen=True)
class SparseMlpSpec:
    """``y = sum_i activation(x . gate_i) * (x . up_i) * down_i`` over the neurons i of a list, or over all.

    A neuron is one contiguous row of each of gate, up and down, all ``[F, hidden]``: down is stored transposed. A list
    is int32 ``[1, K]`` for all rows of x or ``[R, K]`` for each of them; entries below 0 are none, and one beyond F
    makes the row NaN. dtype: of x, weights and y; sums are float32, and what meets down is rounded to dtype. rows: the
    largest number of rows of x. Chosen by predictors or prompts: CoreInfer (arXiv:2410.18311).
    """

    dtype: str
    rows: int
    activation: ActivationName

    def key(self) -> str:
        """Canonical JSON of the spec."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_key(key: str) -> SparseMlpSpec:
        """The spec whose ``key()`` is ``key``."""
        return SparseMlpSpec(**json.loads(key))


@dataclass(frozen=True)
class ThresholdLinearSpec:
    """``y = x' @ W + b`` with W ``[K, N]``, where x' is x without the elements up to a threshold in absolute value.

    Thresholds are float32 ``[1]`` or one for each input ``[K]`` (a threshold over a column's norm weighs inputs as WINA
    does, arXiv:2505.19427). Rows of W whose input no row of x keeps are not read (TEAL, arXiv:2408.14690); NaN is kept.
    dtype: of x, W, b and y; sums are float32. rows: the largest number of rows of x.
    """

    dtype: str
    rows: int
    bias: bool

    def key(self) -> str:
        """Canonical JSON of the spec."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_key(key: str) -> ThresholdLinearSpec:
        """The spec whose ``key()`` is ``key``."""
        return ThresholdLinearSpec(**json.loads(key))
