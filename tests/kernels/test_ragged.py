"""Attention over ragged caches: the reference and the C++ kernel against attention head by head."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torchaccel.kernels import ragged, reference
from torchaccel.kernels.cpp import attention
from torchaccel.kernels.cpp.append_pages import append_pages
from torchaccel.kernels.cpp.compile import missing_toolchain

from tests.kernels.cpp_support.cases import TOLERANCE
from tests.kernels.ragged_cases import RAGGED_CASES, RaggedCase


def run(case: RaggedCase, kernel: Any, *, finite: bool = False) -> None:
    given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in case.inputs.items()}
    for pool in ("k_pool", "v_pool") if finite else ():
        given[pool].nan_to_num_(0.0)
    got = ragged.attend(kernel, **given)
    tolerance = 4 * TOLERANCE[case.dtype]
    torch.testing.assert_close(got.float(), case.expected(), atol=tolerance, rtol=tolerance)
    for pool, new in (("k_pool", "k_new"), ("v_pool", "v_new")):
        for token in range(case.new):
            slots = given["tails"] + case.appended + token
            assert torch.equal(given[pool][0, 0, slots], given[new][:, :, token])
            given[pool][0, 0, slots] = 0
        before = case.inputs[pool]
        assert ((given[pool] == before) | torch.isnan(before)).all()


@pytest.mark.parametrize("case", RAGGED_CASES, ids=lambda case: case.name)
def test_reference(case: RaggedCase) -> None:
    # The reference reads everything, and weights what is hidden with zero.
    run(case, partial(reference.decode_attention, case.spec), finite=True)


@pytest.mark.parametrize("case", RAGGED_CASES[1:4], ids=lambda case: case.name)
def test_cpp(case: RaggedCase) -> None:
    reason = attention.supports(case.spec)
    if reason is not None:
        pytest.skip(reason)
    run(case, attention.decode_attention(case.spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 5])
def test_generated_append_is_the_reference(dtype: torch.dtype, new: int) -> None:
    """Pools of NaN, tails in any order, keys with foreign strides, values of another dtype."""
    if missing_toolchain() is not None:
        pytest.skip(missing_toolchain())
    tails = torch.randperm(6).view(2, 3)[:, :2].mul(16).contiguous()
    k_new = torch.randn(2, new, 2, 6).to(dtype).transpose(1, 2)
    v_new = torch.randn(2, 2, new, 6)
    lens = torch.tensor([0, 104, 40, 2])
    pools = [[torch.full((1, 1, 104, 6), torch.nan, dtype=dtype) for _ in "kv"] for _ in range(2)]
    for store, (k_pool, v_pool) in zip((ragged.append, append_pages), pools, strict=True):
        store(k_pool, v_pool, k_new, v_new, tails, lens)
    torch.testing.assert_close(pools[1], pools[0], atol=0, rtol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="none of the 104 slots"):
        append_pages(*pools[1], k_new, v_new, tails + 104, lens)
