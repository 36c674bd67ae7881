"""The kernel that torchaccel's compiler chooses, called through the operator that stands in compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import kv_format, ops, registry
from ...kernels.candidates import candidates
from ...kernels.plan import Plan
from ...kernels.spec import AttentionSpec, KVFormat
from ..results import Result
from ..runner import Runner
from ..variants import requested
from .capture import Captured, capture
from .problem import Operator, Problem

# The families that change which keys an attention reads, or how they are stored.
FAMILIES = ("kv_compression", "sparse_attention")


class Kernel(Runner):
    """Append and attend over a cache in its storage format (decode), or a prompt over itself (prefill)."""

    cases = ("attention",)

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._captured = Captured()
        self._device = "cpu"

    def build(self, problem: Problem, case: str) -> Operator:
        """Read the spec off the compiler's work, store the contents in its formats."""
        ops.library()
        self._captured = capture(problem.model, self.options, problem.phase)
        self._device = problem.q.device.type
        spec = self._captured.spec
        if spec is None:
            raise RuntimeError("the compiler leaves this attention to stock scaled_dot_product_attention")
        bind = _decode if problem.phase == "decode" else _prefill
        bound = [bind(spec, problem.q, k, v) for k, v in problem.contents]
        return Operator([call for call, _ in bound], bound[0][1])

    def describe(self, model: Operator, result: Result) -> None:
        """The spec and who runs it."""
        spec = self._captured.spec
        assert spec is not None
        result.effective = {"kernel": _seed(spec, self._device).picks[0][1].key(), "spec": spec.key()}
        others = [family for family in requested(self.options) if family not in FAMILIES]
        reasons = [*self._captured.declines, *(f"{family} does not change the operator" for family in others)]
        if reasons:
            result.status, result.reason = "declined", "; ".join(reasons)

    @property
    def methods(self) -> dict[str, Any]:
        """The requested methods that the operator sees."""
        return {family: method for family, method in requested(self.options).items() if family in FAMILIES}


def _decode(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Tensor], int]:
    """The last token of k, v is new, the others are stored; every call writes it to the same place again."""
    length = k.shape[2] - 1
    keys, values = _store(spec.key_format, k, length), _store(spec.value_format, v, length)
    lens = torch.tensor([0, length, length])
    new = k[:, :, length:].contiguous(), v[:, :, length:].contiguous()
    attend = torch.ops.torchaccel.attend.default
    plan = _seed(spec, q.device.type).key()
    return partial(attend, q, *new, keys, values, lens, None, None, plan), keys.nbytes + values.nbytes


def _prefill(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Tensor], int]:
    plan = _seed(spec, q.device.type).key()
    return partial(torch.ops.torchaccel.attend_prompt.default, q, k, v, None, plan), k.nbytes + v.nbytes


def _seed(spec: AttentionSpec, device: str) -> Plan:
    return Plan(spec, ((None, candidates(spec, device)[0]),))


def _store(fmt: KVFormat, tokens: Tensor, length: int) -> Tensor:
    buf = kv_format.allocate(fmt, tokens.shape[0], tokens.shape[1], length + 1, tokens.device)
    registry.append(fmt, tokens.device.type).run(buf, 0, tokens[:, :, :length])
    return buf
