"""The reference itself, against torch's scaled_dot_product_attention and linear in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchaccel.kernels import reference
from torchaccel.kernels.spec import AttentionSpec, KVFormat

FMT = KVFormat("dense", "float32", 16)
DECODE = AttentionSpec("decode", 16, 3, "float32", FMT, FMT, scale=0.25)
PREFILL = replace(DECODE, phase="prefill")


def decode(spec: AttentionSpec, length: int, new: int, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k_new, v_new = torch.randn(2, 6, new, 16), torch.randn(2, 2, new, 16), torch.randn(2, 2, new, 16)
    k, v = torch.randn(2, 2, length + new + 5, 16), torch.randn(2, 2, length + new + 5, 16)
    lens = torch.tensor([0, length, length])
    out = reference.decode_attention(spec, q, k_new, v_new, k, v, lens, mask, None)
    return out, q, k[:, :, : length + new], v[:, :, : length + new], k_new, v_new


@pytest.mark.parametrize("new", [1, 4])
def test_decode_is_stock_attention_over_old_and_new(new: int) -> None:
    out, q, k, v, k_new, v_new = decode(DECODE, 9, new)
    assert torch.equal(k[:, :, 9:], k_new) and torch.equal(v[:, :, 9:], v_new)
    causal = torch.ones(new, 9 + new, dtype=torch.bool).tril(9)
    expected = F.scaled_dot_product_attention(q, k, v, causal, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(kind: str) -> None:
    torch.manual_seed(1)
    mask = torch.rand(2, 1, 1, 10) > 0.4
    mask[..., -1] = True
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out, q, k, v, *_ = decode(replace(DECODE, mask=kind), 9, 1, given)  # type: ignore[arg-type]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask, scale=0.25, enable_gqa=True))


def test_softcap() -> None:
    out, q, k, v, *_ = decode(replace(DECODE, softcap=2.0), 9, 1)
    scores = 2 * torch.tanh(q @ k.repeat_interleave(3, 1).mT * 0.25 / 2)
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(3, 1))


def test_prefill_window_and_sinks_behind_padding() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    mask[1, ..., :7] = False
    out = reference.prefill_attention(replace(PREFILL, window=5, sinks=2, mask="bool"), q, k, v, mask)
    c, t = torch.arange(20), torch.arange(20)[:, None]
    first = torch.tensor([0, 7])[:, None, None]
    seen = mask & ((c <= t) & ((c > t - 5) | (c < first + 2)))[:, None]
    expected = F.scaled_dot_product_attention(q, k, v, seen, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1, :, 7:], expected[1, :, 7:])
    assert (out[1, :, :7] == 0).all()  # these rows see nothing


def test_positions_replace_slots() -> None:
    """Evicting a prefix is attention over the suffix at its old columns."""
    torch.manual_seed(0)
    q, k_new, v_new = torch.randn(1, 6, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    positions = torch.tensor([[[0, 3, 4, 9, 0, 0, 0, 0]]], dtype=torch.int32)
    spec = replace(DECODE, positions=True, mask="bool")
    mask = torch.ones(1, 1, 1, 11, dtype=torch.bool)
    mask[..., 3] = False
    out = reference.decode_attention(spec, q, k_new, v_new, k, v, torch.tensor([0, 4, 10]), mask, positions)
    assert positions[0, 0, 4] == 10
    kept = [0, 2, 3, 4]
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept], scale=0.25, enable_gqa=True)
    )


def test_without_new_tokens_the_mask_decides() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 1, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    mask = (torch.arange(12) < 5)[None, None, None]
    spec = replace(DECODE, causal=False, mask="bool")
    out = reference.decode_attention(spec, q, None, None, k, v, torch.tensor([0, 12, 11]), mask, None)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5], scale=0.25, enable_gqa=True)
    )


def test_rows_without_keys_are_zero_and_nan_propagates() -> None:
    mask = torch.zeros(2, 1, 1, 10, dtype=torch.bool)
    mask[0] = True
    out, q, k, v, *_ = decode(replace(DECODE, mask="bool"), 9, 1, mask)
    assert (out[1] == 0).all() and out[0].isfinite().all()
    q[0, 0, 0, 0] = torch.nan
    lens = torch.tensor([0, 10, 9])
    again = reference.decode_attention(replace(DECODE, mask="bool"), q, None, None, k, v, lens, mask, None)
    assert again[0, 0].isnan().all() and (again[1] == 0).all() and again[0, 1:].isfinite().all()


def test_linear() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 1, 8), torch.randn(5, 8), torch.randn(5)
    got = reference.linear(x, [w, w], [b, None])
    torch.testing.assert_close(got[0], F.linear(x, w, b))
    torch.testing.assert_close(got[1], F.linear(x, w))
