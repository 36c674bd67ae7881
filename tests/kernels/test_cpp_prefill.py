"""The generated C++ prefill attention against the reference and stock attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaccel.kernels import reference
from torchaccel.kernels.cpp import window_prefill
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat

from tests.kernels.cpp_support.cases import random_mask

# Absolute. float32: order of summation. float16: one rounding of the output. bfloat16: that, and probabilities rounded
# to bfloat16 (2^-9 each) before they meet the values.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2, "float16": 2e-3}


def spec(dtype: str, head_dim: int, group: int, **changes: Any) -> AttentionSpec:
    fmt = KVFormat("dense", dtype, head_dim)
    return AttentionSpec("prefill", head_dim, group, dtype, fmt, fmt, scale=head_dim**-0.5, **changes)


SPECS = {
    "f32_window_bool": spec("float32", 64, 3, window=100, sinks=4, mask="bool"),
    "bf16_window": spec("bfloat16", 64, 3, window=70, sinks=4),
    "bf16_causal": spec("bfloat16", 90, 1),
    "f16_window_additive": spec("float16", 80, 2, window=33, sinks=1, mask="additive"),
    "f32_encoder_softcap": spec("float32", 42, 1, causal=False, softcap=5.0, mask="bool"),
}
pytestmark = pytest.mark.skipif(
    window_prefill.supports(SPECS["bf16_causal"]) is not None, reason=str(window_prefill.supports(SPECS["bf16_causal"]))
)


def inputs(case: AttentionSpec, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    heads = (2 * case.group, 2, 2)
    q, k, v = (torch.randn(batch, length, h, case.head_dim).to(DTYPES[case.dtype]).transpose(1, 2) for h in heads)
    return q, k, v


def assert_close(case: AttentionSpec, got: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[case.dtype]
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.is_contiguous()
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("length", [1, 6, 42, 123, 300])
@pytest.mark.parametrize("name", SPECS)
def test_matches_the_reference(name: str, length: int) -> None:
    case = SPECS[name]
    q, k, v = inputs(case, 2, length)
    for batch, heads in ((2, 1), (1, 1), (2, q.shape[1])):
        mask = random_mask(case, batch, heads, length, length)
        expected = reference.prefill_attention(case, q, k, v, mask)
        assert_close(case, window_prefill.prefill_attention(case)(q, k, v, mask), expected)
        if mask is None:
            break


@pytest.mark.parametrize("length", [6, 64, 123, 300])
def test_a_mask_that_hides_the_same_keys_of_all_queries(length: int) -> None:
    case = SPECS["f32_encoder_softcap"]
    q, k, v = inputs(case, 2, length)
    hidden = torch.rand(2, 1, 1, length) < torch.tensor([0.0, 0.3]).view(2, 1, 1, 1)
    hidden[0, ..., 5:] = True
    hidden[1, ..., 64:128] = True
    for mask in (~hidden.expand(-1, -1, length, -1), ~hidden[1:].expand(-1, 2, length, -1)):
        expected = reference.prefill_attention(case, q, k, v, mask)
        assert_close(case, window_prefill.prefill_attention(case)(q, k, v, mask), expected)


def test_causal_agrees_with_stock_attention() -> None:
    case = SPECS["bf16_causal"]
    q, k, v = inputs(case, 1, 200)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).bfloat16()
    assert_close(case, window_prefill.prefill_attention(case)(q, k, v, None), expected)


def test_left_padding_moves_the_sinks() -> None:
    case = SPECS["f32_window_bool"]
    q, k, v = inputs(case, 2, 400)
    mask = torch.ones(2, 1, 400, 400, dtype=torch.bool)
    mask[0, ..., :130] = False
    expected = reference.prefill_attention(case, q, k, v, mask)
    assert (expected[0, :, :130] == 0).all()
    assert_close(case, window_prefill.prefill_attention(case)(q, k, v, mask), expected)


def test_keys_outside_sinks_and_windows_are_not_read() -> None:
    case = replace(SPECS["bf16_window"])
    q, k, v = inputs(case, 1, 700)
    kernel = window_prefill.prefill_attention(case)
    clean = kernel(q, k, v, None)
    k[:, :, 128:320] = torch.nan
    v[:, :, 128:320] = torch.nan
    assert torch.equal(kernel(q, k, v, None)[:, :, 480:], clean[:, :, 480:])


def test_threads_and_empty_inputs() -> None:
    case = SPECS["bf16_window"]
    kernel = window_prefill.prefill_attention(case)
    threads = torch.get_num_threads()
    q, k, v = inputs(case, 1, 300)
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(kernel(q, k, v, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert kernel(q[:0], k[:0], v[:0], None).shape == (0, 6, 300, 64)
    assert kernel(q[:, :, :0], k[:, :, :0], v[:, :, :0], None).shape == (1, 6, 0, 64)


def test_what_is_not_supported_has_a_reason() -> None:
    good = SPECS["bf16_window"]
    for bad, reason in (
        (replace(good, phase="decode"), "phase 'prefill'"),
        (replace(good, head_dim=512), "head dims up to 256"),
        (replace(good, positions=True), "stored positions"),
        (replace(good, group=0), "1 to 64 query heads"),
    ):
        assert reason in (window_prefill.supports(bad) or "")
        with pytest.raises(ValueError, match=reason):
            window_prefill.prefill_attention(bad)
    q, k, v = inputs(good, 1, 8)
    with pytest.raises(ValueError, match="as many keys as queries"):
        window_prefill.prefill_attention(good)(q, k[:, :, :5], v, None)
