"""Expressions against numbers worked out by hand, and how predictions move with sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torchaccel.kernels.candidates import Candidate, Spec
from torchaccel.kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from torchaccel.kernels.spec import AttentionSpec, KVFormat, LinearSpec

from torchaccel.cost import symbols as s
from torchaccel.cost.calibration import Calibration, Coefficients
from torchaccel.cost.devices import device_facts
from torchaccel.cost.roofline import INFEASIBLE, amounts, predict_ms, terms, work_of
from torchaccel.cost.shape import AttentionShape, LinearShape
from torchaccel.cost.symbols import visible_pairs, visible_share
from torchaccel.cost.traffic import Traffic

H200, CPU = device_facts("h200"), device_facts("avx512_bf16")
MIB = 2**20
# The check values of the methods notes: B=1, H_q=32, H_kv=8, D=128, 131072 tokens, 16 splits.
LLAMA = AttentionShape(1, 8, 1, 131072, sites=32)
SPLIT = Candidate("triton", (("block_n", 64), ("splits", 16), ("stages", 3), ("warps", 4)))
IDEAL = Calibration({"cuda/triton/decode_attention/bfloat16": Coefficients(launch=0.0)})


def attention(phase: str = "decode", kind: str = "dense", head_dim: int = 128, group: int = 4) -> AttentionSpec:
    keys = KVFormat(kind, "bfloat16", head_dim, "channel", packing="channel")  # type: ignore[arg-type]
    values = KVFormat(kind, "bfloat16", head_dim, "token", packing="token")  # type: ignore[arg-type]
    return AttentionSpec(phase, head_dim, group, "bfloat16", keys, values, head_dim**-0.5)  # type: ignore[arg-type]


def test_decode_over_128k_on_an_h200() -> None:
    found = amounts(attention(), SPLIT, LLAMA, H200.processors)
    assert found.resident == 512 * MIB
    queries, partials = 2 * 32 * 128 * 2, 2 * 4 * 32 * 16 * (128 + 2)
    assert found.size == 512 * MIB + queries + partials
    # A tensor core works on 16 rows, and a group has 4: four times the 2.147 GFLOP that are needed.
    assert found.flops == 4 * 32 * 131072 * 128 * 4
    assert found.launches == 2
    # 128 programs of equal length for 132 multiprocessors.
    assert found.load == pytest.approx(1 / 128)
    # 112 us at the bandwidth of the data sheet.
    assert predict_ms(attention(), SPLIT, LLAMA, H200, IDEAL) == pytest.approx(0.112, rel=0.01)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4), ("int2", 2)])
def test_quantised_caches_are_read_with_their_scales(kind: str, bits: int) -> None:
    found = amounts(attention(kind=kind), SPLIT, LLAMA, H200.processors)
    # Blocks of 64 tokens: keys have a float16 scale and minimum for each of 128 channels, values for each token.
    block = 64 * 128 * bits / 8
    stored = (131072 - 32) / 64 * ((block + 4 * 128) + (block + 4 * 64))
    assert found.resident == pytest.approx(8 * (stored + 32 * 2 * 128 * 2))
    assert found.codes == 2 * 8 * (131072 - 32) * 128


def test_corrections_of_codes_are_read_and_decoded() -> None:
    plain = attention(kind="int2")
    keys, values = (replace(fmt, rank=2, outliers=4) for fmt in (plain.key_format, plain.value_format))
    spec = replace(plain, key_format=keys, value_format=values)
    before, found = (amounts(case, Candidate("cpp"), LLAMA, CPU.processors) for case in (plain, spec))
    # Of every block of 64 tokens and 128 channels: two pairs of factors; 4 outliers for each channel or token.
    factors, outliers = 2 * (64 + 128), 4 * (128 + 64)
    blocks = 8 * (131072 - 32) / 64
    assert found.resident - before.resident == pytest.approx(blocks * (2 * 2 * factors + 3 * outliers))
    assert found.codes - before.codes == pytest.approx(blocks * (2 * factors + outliers))


def test_latents_are_few_bytes_and_many_flops() -> None:
    plain = attention()
    spec = replace(plain, key_format=KVFormat("latent", "bfloat16", 128, block=64, rank=32))
    before, found = (amounts(case, Candidate("cpp"), LLAMA, CPU.processors) for case in (plain, spec))
    # A quarter of a key's bytes, but for the half block that waits; each of 8 heads needs all 8 x 32 latents.
    assert before.resident - found.resident == pytest.approx(8 * (131072 - 32) * 2 * (128 - 32))
    assert found.flops - before.flops == pytest.approx(2 * 8 * (131072 - 32) * 128 * 8 * 32)


def test_symbols_can_be_substituted() -> None:
    work = work_of(attention(), Candidate("cpp"))
    values = {s.B: 1, s.H_q: 12, s.H_kv: 4, s.S_q: 1, s.S_kv: 1024, s.D: 64, s.density: 1, s.bits: 16, s.width: 2}
    values |= {s.tail: 0, s.latents: 0, s.P: 2}
    assert work.flops.subs(values) == 4 * 12 * 1024 * 64
    assert work.resident.subs(values) == 2 * 4 * 1024 * 64 * 2
    assert work.utilisation.subs(values) == 1


@pytest.mark.parametrize(
    ("split", "batch", "kv_heads", "tokens", "load", "pieces"),
    [
        # Two threads. One unit of 64 tiles: halves, or one thread does it all.
        ("stream", 1, 1, 4096, 1 / 2, 2),
        ("kv", 1, 1, 4096, 1 / 2, 2),
        ("single", 1, 1, 4096, 1, 1),
        # Three units: two rounds, of which the second keeps one thread busy.
        ("single", 1, 3, 4096, 2 / 3, 3),
        ("kv", 1, 3, 4096, 1 / 2, 6),
        ("stream", 1, 3, 4096, 1 / 2, 4),
        # Too few tiles to wake a second thread.
        ("stream", 1, 1, 256, 1, 1),
        ("kv", 1, 1, 256, 1, 1),
    ],
)
def test_how_threads_share_the_tiles(
    split: str, batch: int, kv_heads: int, tokens: int, load: float, pieces: int
) -> None:
    found = amounts(attention(), Candidate("cpp", (("split", split),)), AttentionShape(batch, kv_heads, 1, tokens), 2)
    assert found.load == pytest.approx(load)
    assert found.pieces == pieces


@pytest.mark.parametrize(
    ("split", "tokens", "load", "launches"),
    [
        # Eight KV heads on 132 multiprocessors: one program each leaves most of them idle; 33 splits fill them twice.
        ("single", 131072, 1 / 8, 1),
        ("kv", 131072, 2 * 63 / (8 * 2048), 2),
        # 16384 tiles for 264 programs: 63 tiles each.
        ("stream", 131072, 2 * 63 / 16384, 2),
        ("kv", 64, 1 / 8, 1),
    ],
)
def test_how_multiprocessors_share_the_tiles(split: str, tokens: int, load: float, launches: int) -> None:
    candidate = Candidate("triton", (("block_n", 64), ("split", split), ("stages", 3), ("warps", 4)))
    found = amounts(attention(), candidate, AttentionShape(1, 8, 1, tokens), 132)
    assert found.load == pytest.approx(load)
    assert found.launches == launches


def test_a_window_bounds_what_is_read() -> None:
    spec = replace(attention(), window=1024, sinks=4)
    short, long = (amounts(spec, Candidate("cpp"), AttentionShape(1, 8, 1, n), 2) for n in (4096, 65536))
    assert short.resident == long.resident == pytest.approx(2 * 8 * 1028 * 128 * 2)


def test_pairs_equal_a_mask() -> None:
    for window, sinks in ((None, 0), (5, 2), (100, 1)):
        rows = range(40 - 7, 40)
        seen = sum(1 for t in rows for c in range(t + 1) if window is None or c > t - window or c < sinks)
        assert visible_pairs(7, 40, True, window, sinks) == seen


def test_a_causal_prompt_reads_half_of_the_pairs() -> None:
    shape = AttentionShape(1, 8, 8192, 8192)
    found = amounts(attention("prefill"), Candidate("triton", (("block_m", 128), ("block_n", 64))), shape, 132)
    # 0.550 TFLOP, and half a tile of keys and of queries at the diagonal.
    assert found.flops == pytest.approx(0.550e12 * (1 + 2 * 96 / 8192), rel=0.01)


def test_a_linear_layer_reads_its_weights_once() -> None:
    shape = LinearShape(2, 768, (768, 256, 256))
    found = amounts(LinearSpec("bfloat16", 2, False), Candidate("cpp"), shape, 2)
    assert found.resident == 768 * 1280 * 2
    assert found.size == found.resident + 2 * (768 + 1280) * 2
    assert found.flops == 2 * 2 * 768 * 1280


@pytest.mark.parametrize("spec", [SparseMlpSpec("bfloat16", 1, "silu"), ThresholdLinearSpec("bfloat16", 1, False)])
def test_half_of_the_weights_are_half_of_the_bytes(spec: Spec) -> None:
    whole = LinearShape(1, 4096, (14336,) * 3)
    half = replace(whole, density=0.5)
    every, some = (amounts(spec, Candidate("cpp"), shape, 2) for shape in (whole, half))
    assert every.resident == 3 * 4096 * 14336 * 2 and some.resident == every.resident / 2
    assert some.size == pytest.approx(every.size / 2, rel=1e-3) and some.flops == every.flops / 2
    # Dense layers are read whole whatever a list says, and the reference copies what it reads.
    dense = predict_ms(LinearSpec("bfloat16", 1, False), Candidate("cpp"), whole, CPU)
    assert predict_ms(spec, Candidate("cpp"), half, CPU) < 0.6 * dense
    assert predict_ms(spec, Candidate("reference"), half, CPU) > 2 * predict_ms(spec, Candidate("cpp"), half, CPU)


@pytest.mark.parametrize("candidate", [Candidate("cpp"), Candidate("composed"), Candidate("reference")])
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_more_work_never_takes_less_time(candidate: Candidate, kind: str) -> None:
    spec = attention(kind=kind)
    base = AttentionShape(2, 4, 1, 2000)
    time = predict_ms(spec, candidate, base, CPU)
    for more in (base.at(4000), replace(base, batch=4), replace(base, kv_heads=8), replace(base, queries=4)):
        assert predict_ms(spec, candidate, more, CPU) >= time
    faster = replace(CPU, dram_gbs=CPU.dram_gbs * 2, cache_gbs=CPU.cache_gbs * 2, processor_gbs=50.0)
    assert predict_ms(spec, candidate, base, faster) <= time


def test_what_fits_the_cache_is_read_from_it_unless_other_layers_push_it_out() -> None:
    alone = terms(attention(), Candidate("cpp"), AttentionShape(1, 8, 1, 4096), CPU)
    one_of_many = terms(attention(), Candidate("cpp"), AttentionShape(1, 8, 1, 4096, sites=32), CPU)
    assert alone.memory == 0 and one_of_many.cache == 0
    assert alone.cache < one_of_many.memory


def test_a_tile_that_does_not_fit_shared_memory_is_infeasible() -> None:
    big = Candidate("triton", (("block_n", 256), ("splits", 16), ("stages", 4), ("warps", 4)))
    assert predict_ms(attention(), big, LLAMA, H200) == INFEASIBLE


def test_a_gpu_pays_for_corrections_by_the_element_and_for_latents_by_the_product() -> None:
    dense, shape = KVFormat("dense", "bfloat16", 128), AttentionShape(1, 8, 1, 4096)
    keys, values = KVFormat("int2", "bfloat16", 128, "channel"), KVFormat("int2", "bfloat16", 128, packing="token")
    plain, low_rank, gear, latent = (
        amounts(replace(attention(), key_format=k, value_format=v), SPLIT, shape, 132)
        for k, v in (
            (keys, values),
            (replace(keys, rank=2), replace(values, rank=2)),
            (replace(keys, outliers=2), replace(values, outliers=2)),
            (KVFormat("latent", "bfloat16", 128, rank=32), dense),
        )
    )
    assert plain.codes < low_rank.codes < 1.1 * plain.codes and gear.codes > 3 * plain.codes
    rebuilt = 2 * 8 * 128 * (8 * 32) * (4096 - 32)
    exact = amounts(attention(), SPLIT, shape, 132)
    assert latent.flops - exact.flops == pytest.approx(rebuilt, rel=1e-6) and latent.size < 0.7 * exact.size
    spec = replace(attention(), key_format=KVFormat("latent", "bfloat16", 128, rank=32))
    assert predict_ms(spec, SPLIT, shape, H200) < predict_ms(spec, Candidate("reference"), shape, H200)


def test_few_bytes_in_flight_do_not_keep_the_memory_busy() -> None:
    one = Candidate("triton", (("block_n", 16), ("splits", 16), ("stages", 1), ("warps", 4)))
    assert predict_ms(attention(), one, LLAMA, H200) > 2 * predict_ms(attention(), SPLIT, LLAMA, H200)


def test_what_has_no_formula_is_an_error() -> None:
    with pytest.raises(ValueError, match="no formulas for linear by composed"):
        work_of(LinearSpec("bfloat16", 1, False), Candidate("composed"))
    with pytest.raises(ValueError, match="no free choices"):
        work_of(attention(), Candidate("composed", (("split", "kv"),)))
    with pytest.raises(ValueError, match="found 'thirds'"):
        work_of(attention(), Candidate("cpp", (("split", "thirds"),)))
    with pytest.raises(TypeError, match="LinearShape"):
        amounts(attention(), Candidate("cpp"), LinearShape(1, 2, (3,)), 2)


def test_traffic_builds_the_specs_of_methods() -> None:
    spec = Traffic({"kv_compression": {"method": "int8"}}).spec("decode", "bfloat16", 128, 4)
    assert spec == attention(kind="int8")
    assert (
        not Traffic({"kv_compression": {"method": "int8"}}).spec("prefill", "bfloat16", 128, 4).key_format.is_quantised
    )


def test_windows_of_some_heads_leave_the_others_whole() -> None:
    shape = AttentionShape(1, 4, 1, 1000)
    spec = Traffic({"sparse_attention": {"method": "sliding_window", "window": 100}}).spec("decode", "float32", 64, 2)
    assert visible_share(spec, shape) == pytest.approx(0.1)
    assert visible_share(replace(spec, head_windows=True), shape) == pytest.approx(0.55)
