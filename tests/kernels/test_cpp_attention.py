"""The generated C++ decode attention against the reference, over formats, masks, shapes and threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchaccel.kernels import kv_format, reference
from torchaccel.kernels.cpp import attention

from tests.kernels.cpp_support.cases import SPECS, Inputs, assert_same, inputs, poisoned, random_mask

pytestmark = pytest.mark.skipif(
    attention.supports(SPECS["f32"]) is not None, reason=str(attention.supports(SPECS["f32"]))
)

APPENDING = [name for name in SPECS if "static" not in name]


def with_positions(case: Inputs) -> Inputs:
    """Slots whose columns have gaps, as after an eviction."""
    if case.spec.positions:
        batch, end = case.q.shape[0], int(case.lens[1])
        logical = 2 * end + 5
        case.lens[2] = logical
        apart = 1 if end == 42 else case.k_buf.shape[1]  # KV heads share their columns, or do not
        columns = torch.stack([torch.randperm(logical)[:end].sort().values for _ in range(batch * apart)])
        case.positions = torch.full((batch, apart, end + 200), -7, dtype=torch.int32)
        case.positions[..., :end] = columns.view(batch, apart, end)
    return case


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("length", [1, 6, 42, 123, 1000])
@pytest.mark.parametrize("name", APPENDING)
def test_matches_the_reference(name: str, length: int, new: int) -> None:
    batch = 1 + length % 2
    case = with_positions(inputs(SPECS[name], batch=batch, length=length, new=new))
    case.mask = random_mask(case.spec, batch, 1, new, int(case.lens[2]) + new)
    assert_same(case, case.got(), case.expected(), length + new)


@pytest.mark.parametrize(("length", "new"), [(0, 1), (0, 70), (60, 130)])
@pytest.mark.parametrize("name", ["f32", "f32_int8", "f32_int8_keys_window", "bf16_softcap"])
def test_many_new_tokens_are_causal_among_themselves(name: str, length: int, new: int) -> None:
    case = inputs(SPECS[name], batch=2, length=length, new=new)
    assert_same(case, case.got(), case.expected(), length + new)


@pytest.mark.parametrize("name", ["f32_int8", "bf16_int8_bool"])
def test_blocks_complete_step_by_step(name: str) -> None:
    """130 single tokens from an empty buffer: two blocks fill, and every step sees what the reference sees."""
    case = inputs(SPECS[name], length=0)
    kernel = attention.decode_attention(case.spec)
    ours, theirs = [case.k_buf.clone(), case.v_buf.clone()], [case.k_buf.clone(), case.v_buf.clone()]
    for buffers in (ours, theirs):
        for i, fmt in enumerate((case.spec.key_format, case.spec.value_format)):
            buffers[i] = poisoned(fmt, 1, 2, 130)
    for step in range(130):
        one = inputs(case.spec, length=0, seed=step)
        lens = torch.tensor([0, step, step])
        mask = random_mask(case.spec, 1, 1, 1, step + 1)
        out = kernel(one.q, one.k_new, one.v_new, *ours, lens, mask, None)
        want = reference.decode_attention(case.spec, one.q, one.k_new, one.v_new, *theirs, lens, mask, None)
        assert_same(case, (out, *ours), (want, *theirs), step + 1)


@pytest.mark.parametrize("name", ["bf16_bool", "f16_additive", "f32_additive", "f32_window_bool"])
def test_mask_broadcasts_over_batch_and_heads_with_any_strides(name: str) -> None:
    case = inputs(SPECS[name], batch=3, length=200, new=2)
    heads, columns = case.q.shape[1], 202
    for batch_size, head_size in ((1, 1), (3, 1), (1, heads), (3, heads)):
        mask = random_mask(case.spec, batch_size, head_size, 2, columns)
        assert mask is not None
        for variant in (mask, mask.transpose(2, 3).contiguous().transpose(2, 3), mask.expand(3, -1, -1, -1)):
            case.mask = variant
            assert_same(case, case.got(), case.expected(), columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_additive_masks_of_every_float_dtype(dtype: torch.dtype) -> None:
    case = inputs(SPECS["f32_additive"], batch=2, length=150)
    case.mask = torch.zeros(2, 1, 1, 151, dtype=dtype)
    case.mask[0, ..., :90] = torch.finfo(dtype).min
    case.mask[1, ..., 3] = -torch.inf
    case.mask[1, ..., 5] = 1.5
    assert_same(case, case.got(), case.expected(), 151)


@pytest.mark.parametrize("name", ["bf16_bool", "f32_additive", "bf16_int8_bool"])
def test_hidden_tiles_are_not_read(name: str) -> None:
    """Left padding of 128 tokens that holds NaN does not reach the result."""
    case = inputs(SPECS[name], batch=2, length=300)
    allowed = torch.ones(2, 1, 1, 301, dtype=torch.bool)
    allowed[0, ..., :128] = False
    case.mask = (
        allowed
        if case.spec.mask == "bool"
        else torch.zeros(2, 1, 1, 301).masked_fill(~allowed, torch.finfo(torch.float32).min)
    )
    expected = case.expected()
    for fmt, buf in ((case.spec.key_format, case.k_buf), (case.spec.value_format, case.v_buf)):
        if fmt.kind == "dense":
            buf[0, :, :128] = torch.nan
        else:
            for part in kv_format.blocks(fmt, buf)[1:]:
                part[0, :, :2] = torch.nan
    got = case.got()
    assert torch.isfinite(got[0].float()).all()
    assert_same(case, (got[0], *expected[1:]), expected, 301)


def test_rows_that_see_nothing() -> None:
    """All False gives zeros; an additive minimum on every key gives their plain average, as in the reference."""
    case = inputs(SPECS["bf16_bool"], batch=2, length=100)
    case.mask = torch.ones(2, 1, 1, 101, dtype=torch.bool)
    case.mask[1] = False
    got = case.got()
    assert (got[0][1] == 0).all()
    assert_same(case, got, case.expected(), 101)
    case = inputs(SPECS["f32_additive"], batch=2, length=100)
    case.mask = torch.zeros(2, 1, 1, 101)
    case.mask[1] = torch.finfo(torch.float32).min
    assert_same(case, case.got(), case.expected(), 101)
    case.mask[1] = -torch.inf
    got = case.got()
    assert (got[0][1] == 0).all()
    assert_same(case, got, case.expected(), 101)


def test_sinks_begin_after_left_padding() -> None:
    case = inputs(SPECS["f32_window_bool"], batch=2, length=400)
    case.mask = torch.ones(2, 1, 1, 401, dtype=torch.bool)
    case.mask[0, ..., :150] = False
    assert_same(case, case.got(), case.expected(), 401)


@pytest.mark.parametrize("start", [1, 64, 77])
@pytest.mark.parametrize("name", ["f32", "f32_int8", "f32_int8_keys_window"])
def test_dead_slots_at_the_start(name: str, start: int) -> None:
    case = inputs(SPECS[name], batch=2, length=200, new=2)
    case.lens = torch.tensor([start, 200, 200 - start])
    assert_same(case, case.got(), case.expected(), 202)


@pytest.mark.parametrize("valid", [1, 130, 500])
def test_static_cache_attends_without_appending(valid: int) -> None:
    """The whole buffer is given, of any strides; the mask says which prefix counts, and hidden tiles are not read."""
    case = inputs(SPECS["f32_static_bool"], batch=2, length=512, new=2)
    k, v = (torch.randn(512, 2, 2, 64).permute(1, 2, 0, 3) for _ in range(2))
    mask = torch.zeros(2, 1, 2, 512, dtype=torch.bool)
    mask[:, :, 0, :valid] = True
    mask[:, :, 1, : valid + 1] = True
    lens = torch.tensor([0, 512, 510])
    expected = reference.decode_attention(case.spec, case.q, None, None, k, v, lens, mask, None)
    k[:, :, (valid + 64) // 64 * 64 :] = torch.nan
    v[:, :, (valid + 64) // 64 * 64 :] = torch.nan
    got = attention.decode_attention(case.spec)(case.q, None, None, k, v, lens, mask, None)
    torch.testing.assert_close(got, expected, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("name", ["f32", "bf16_bool", "f32_int8"])
def test_nan_propagates(name: str) -> None:
    case = inputs(SPECS[name], batch=2, length=100)
    case.mask = None if case.spec.mask == "none" else torch.ones(1, 1, 1, 101, dtype=torch.bool)
    assert case.k_new is not None
    case.k_new[1, 0, 0, 3] = torch.nan
    got, expected = case.got()[0], case.expected()[0]
    assert got[1, : case.spec.group].isnan().all() and not got[0].isnan().any()
    assert torch.equal(got.isnan(), expected.isnan())


def test_threads_split_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three thousand keys over two threads: partial results are merged."""
    case = inputs(SPECS["f32"], length=3000)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same(case, case.got(), case.expected(), 3001)
    finally:
        torch.set_num_threads(threads)


def test_other_dtypes_of_the_new_tokens_are_converted() -> None:
    case = inputs(SPECS["bf16_bool"], length=10)
    case.mask = torch.ones(1, 1, 1, 11, dtype=torch.bool)
    assert case.k_new is not None and case.v_new is not None
    case.k_new, case.v_new = case.k_new.float(), case.v_new.float()
    assert_same(case, case.got(), case.expected(), 11)


def test_empty_batch() -> None:
    case = inputs(SPECS["f32"], batch=0, length=5)
    assert case.got()[0].shape == (0, 6, 1, 64)


def test_full_buffer_is_an_error() -> None:
    case = inputs(SPECS["f32"], length=5)
    case.lens = torch.tensor([0, case.k_buf.shape[2], 5])
    with pytest.raises(RuntimeError, match="grow it first"):
        case.got()


def test_missing_mask_is_an_error() -> None:
    case = inputs(SPECS["bf16_bool"], length=5)
    with pytest.raises(ValueError, match="generated for a mask"):
        case.got()


def test_what_is_not_supported_has_a_reason() -> None:
    good = SPECS["f32_int8"]
    key = good.key_format
    for bad, reason in (
        (replace(good, phase="prefill"), "phase 'decode'"),
        (replace(good, group=65), "1 to 64 query heads"),
        (replace(good, key_format=replace(key, head_dim=264)), "head dims up to 256"),
        (replace(good, key_format=replace(key, packing="token")), "side by side by channel"),
        (replace(good, key_format=replace(key, block=24)), "multiple of 16 tokens"),
        (replace(good, key_format=replace(key, group=24)), "multiples of 16 that divide"),
        (replace(good, key_format=replace(key, kind="empty")), "not stored"),
        (replace(good, dtype="float64"), "knows the dtypes"),
    ):
        assert reason in (attention.supports(bad) or "")
        with pytest.raises(ValueError, match=reason):
            attention.decode_attention(bad)
