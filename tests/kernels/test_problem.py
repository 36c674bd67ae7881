"""Random problems: every spec gets arguments its reference accepts, equal seeds equal values, and teeth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torchaccel.kernels import kv_format, problem, reference
from torchaccel.kernels.candidates import Candidate, build, candidates, kernel_name
from torchaccel.kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from torchaccel.kernels.spec import AttentionSpec, KVFormat, LinearSpec

CPU = torch.device("cpu")
DENSE = KVFormat("dense", "float32", 32)
DECODE = AttentionSpec("decode", 32, 2, "float32", DENSE, DENSE, 32**-0.5)
INT8 = KVFormat("int8", "float32", 32, "channel"), KVFormat("int8", "float32", 32, "token", packing="token")
SHAPE = {"B": 2, "H_kv": 2, "Q": 1, "S": 200}
SPECS = {
    "decode": DECODE,
    "decode_bool": replace(DECODE, mask="bool"),
    "decode_additive": replace(DECODE, mask="additive"),
    "decode_positions": replace(DECODE, positions=True, mask="bool"),
    "decode_int8": replace(DECODE, key_format=INT8[0], value_format=INT8[1]),
    "decode_prefix": replace(DECODE, causal=False, lse=True),
    "decode_rotary": replace(DECODE, rotary="half", rotary_dim=16),
    "decode_gear": replace(
        DECODE,
        key_format=KVFormat("int2", "float32", 32, "channel", rank=2, outliers=2),
        value_format=KVFormat("int2", "float32", 32, "token", packing="token", rank=2, outliers=2),
    ),
    "decode_codebook": replace(
        DECODE,
        key_format=KVFormat("int4", "float32", 32, "token", codebook="gaussian"),
        value_format=KVFormat("int2", "float32", 32, "token", packing="token", codebook="gaussian"),
    ),
    "decode_latent": replace(DECODE, key_format=KVFormat("latent", "float32", 32, block=32, rank=4), positions=True),
    "decode_window": replace(DECODE, window=50, sinks=4, head_windows=True),
    "decode_blocks": replace(DECODE, index="blocks", lse=True),
    "decode_tokens": replace(DECODE, index="tokens", mass=True),
    "prefill": replace(DECODE, phase="prefill"),
    "prefill_additive": replace(DECODE, phase="prefill", mask="additive"),
    "prefill_blocks": replace(DECODE, phase="prefill", index="blocks"),
}


LAYERS = {
    "linear": LinearSpec("float32", 2, True),
    "sparse_mlp": SparseMlpSpec("float32", 2, "silu"),
    "threshold_linear": ThresholdLinearSpec("float32", 2, True),
}


def outcome(spec: Any, shape: dict[str, int], seed: int) -> list[torch.Tensor]:
    """The reference's results on a fresh problem."""
    args = problem.make(spec, shape, CPU, seed)
    return problem.results(spec, build(spec, Candidate("reference"))(*args), args)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_problems_that_their_kernels_solve(name: str) -> None:
    spec, shape = LAYERS[name], {"M": 2, "K": 123, "N": 42}
    args = problem.make(spec, shape, CPU, 1)
    assert kernel_name(spec) == name
    first, again, other = (outcome(spec, shape, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0]) and first[0].isfinite().all()
    if candidates(spec, "cpu")[0] == Candidate("cpp"):
        (got,) = problem.results(spec, build(spec, Candidate("cpp"))(*args), args)
        bound = problem.tolerances(spec, CPU)[0] * first[0].abs().max()
        assert (got - first[0]).abs().max() <= bound


@pytest.mark.parametrize("name", SPECS)
def test_the_reference_takes_the_problem_and_no_result_is_poisoned(name: str) -> None:
    spec = SPECS[name]
    first, again, other = (outcome(spec, SHAPE, seed) for seed in (1, 1, 2))
    tolerances = problem.tolerances(spec, CPU)
    assert len(first) == len(tolerances)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
    assert not torch.equal(first[0], other[0])


def test_linear_layers() -> None:
    spec = LinearSpec("float32", 3, True)
    args = problem.make(spec, {"M": 3, "K": 16, "N": 8}, CPU, 0)
    (found,) = problem.results(spec, reference.linear(*args), args)
    torch.testing.assert_close(found, args[0] @ args[1][0].T + args[2][0])


def test_a_shape_that_lacks_a_symbol_is_named() -> None:
    with pytest.raises(ValueError, match="add Q"):
        problem.make(DECODE, {"B": 1, "H_kv": 1, "S": 8}, CPU, 0)


def test_linear_layers_have_no_more_rows_than_their_spec() -> None:
    # The bucket of 3 rows is measured at 4, which a kernel for 3 refuses.
    x, *_ = problem.make(LinearSpec("float32", 3, False), {"M": 4, "K": 16, "N": 8}, CPU, 0)
    assert x.shape == (3, 16)


def test_slots_beyond_the_end_are_nan() -> None:
    _, _, _, k_buf, _, lens, _, _ = problem.make(DECODE, SHAPE, CPU, 0)
    assert lens.tolist() == [0, 199, 199] and k_buf[:, :, 199:].isnan().all() and not k_buf[:, :, :199].isnan().any()


def test_one_key_that_is_left_out_is_seen() -> None:
    # Of a thousand keys, the heaviest ones: with flat weights each would change the result by less than is allowed.
    shape = {**SHAPE, "S": 1000}
    q, k_new, v_new, k_buf, v_buf, lens, *_ = problem.make(DECODE, shape, CPU, 0)
    full = reference.decode_attention(DECODE, q, k_new, v_new, k_buf.clone(), v_buf.clone(), lens, None, None)
    assert isinstance(full, torch.Tensor)
    worst = torch.zeros(())
    for left_out in range(0, 999, 100):
        mask = torch.ones(1, 1, 1, 1000, dtype=torch.bool)
        mask[..., left_out : left_out + 100] = False
        spec = replace(DECODE, mask="bool")
        part = reference.decode_attention(spec, q, k_new, v_new, k_buf.clone(), v_buf.clone(), lens, mask, None)
        worst = torch.maximum(worst, (part - full).abs().max() / full.abs().max())  # type: ignore[operator]
    assert worst > 10 * problem.tolerances(DECODE, CPU)[0]


def test_stored_tokens_are_part_of_the_results() -> None:
    args = problem.make(DECODE, SHAPE, CPU, 0)
    before = problem.copied(args)
    reference.decode_attention(DECODE, *args)
    stored = problem.results(DECODE, args[0], args)[1]
    assert torch.equal(stored[:, :, -1:], args[1]) and before[3][:, :, 199].isnan().all()
    assert kv_format.capacity(DENSE, args[3]) == 199 + 1 + problem.SLACK
