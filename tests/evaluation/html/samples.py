"""Documents made up for the tests of the report: the shapes of real ones, with numbers nobody measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchaccel.evaluation.html.documents import PREFIX

# label: (options, ms, bound ms, KV MB, perplexity ratio, KL, recall)
VARIANTS: dict[str, tuple[dict[str, Any], float, float, float, float, float, float]] = {
    "eager": ({}, 92.4, 14.7, 403, 1.00002, 7.1e-5, 0.98),
    "inductor": ({}, 81.2, 14.7, 403, 1.00001, 3.8e-5, 0.98),
    "static": ({}, 79.9, 14.7, 403, 1.00003, 3.9e-5, 0.98),
    "kvpress:snapkv": ({}, 44.0, 9.9, 101, 1.012, 0.021, 0.71),
    "torchaccel:exact": ({}, 23.3, 14.7, 403, 1.00001, 3.6e-5, 0.98),
    "torchaccel:int8": ({"kv_compression": "int8"}, 18.5, 10.1, 214, 1.0004, 5.5e-4, 0.98),
    "torchaccel:kivi": ({"kv_compression": {"method": "kivi", "bits": 4}}, 16.9, 8.1, 118, 1.0061, 0.0083, 0.97),
    "torchaccel:kivi#2": ({"kv_compression": {"method": "kivi", "bits": 2}}, 16.2, 7.4, 72, 1.094, 0.094, 0.88),
    "torchaccel:streaming_llm": ({"sparse_attention": "streaming_llm"}, 9.4, 5.6, 26, 1.041, 0.31, 0.24),
    "torchaccel:quest": ({"sparse_attention": "quest"}, 13.1, 6.7, 431, 1.0021, 0.0048, 0.96),
    "torchaccel:streaming_llm+int8": (
        {"sparse_attention": "streaming_llm", "kv_compression": "int8"},
        *(9.1, 5.2, 14, 1.0415, 0.312, 0.24),
    ),
    "torchaccel:unified+fastv+int8+streaming_llm": (
        {"layer_skipping": "unified", "token_pruning": "fastv"},
        *(7.2, 4.1, 11, 1.62, 0.92, 0.08),
    ),
}
EMPTY_FIDELITY = dict.fromkeys(
    (
        *("max_abs_err_vs_fp32", "eager_max_abs_err_vs_fp32", "kl", "top1", "greedy_prefix", "perplexity"),
        *("perplexity_ratio", "perplexity_ratio_ci95", "bits_per_byte", "recall"),
    )
)


def spread(median: float) -> dict[str, float]:
    return {"median": median, "min": 0.93 * median, "max": 1.21 * median, "n": 20}


def result(variant: str, **fields: Any) -> dict[str, Any]:
    """A result with null wherever ``fields`` say nothing."""
    nothing = ("effective", "reason", "ms", "ttft_ms", "tpot_ms", "speedup", "bound_ms", "roofline_fraction")
    nothing = (*nothing, "kv_bytes", "peak_bytes", "graphs", "recompiles", "predicted_ms", "density", "details")
    base = {"variant": variant, "options": {}, "status": "ok", "compile_s": {"cold": None, "warm": None}}
    return {**base, **dict.fromkeys(nothing), "fidelity": dict(EMPTY_FIDELITY), **fields}


def document(kind: str, results: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
    return {
        "command": ["torchaccel", "bench", kind, "--model", "demo", "--context", "32768", "--json", "results/a b.json"],
        "versions": {
            "torchaccel": "0.1.0",
            "torch": "2.13.0+cpu",
            "triton": None,
            "transformers": "5.23.0",
            "python": "3.11.7",
            "compiler": "g++ 12.2.0",
        },
        "machine": {
            "device": "Sample CPU",
            "cores": 2,
            "read_gbs": 40.97,
            "copy_gbs": 58.35,
            "gemm_gflops": {"float32": 186.5, "bfloat16": 777.1},
            "load_before": 0.9,
            "load_after": 1.35,
            "busy": False,
        },
        "model": {
            "name": "sample-110m",
            "params": 100_092_672,
            "weight_bytes": 200_185_344,
            "dtype": "bfloat16",
            "layers": 12,
            "heads": 12,
            "kv_heads": 4,
            "head_dim": 64,
        },
        "case": {"kind": kind, "batch": 1, "context": 32768, "new_tokens": None, "rounds": 20, "warmup": 3},
        "results": list(results),
        **fields,
    }


def decode_document() -> dict[str, Any]:
    """Twelve variants, three of them almost in one place, and one each that was absent, declined and failed."""
    times = {variant: values[1] for variant, values in VARIANTS.items()}
    results = []
    for variant, (options, ms, bound, kv, *_) in VARIANTS.items():
        ours = variant.startswith(PREFIX)
        results.append(
            result(
                variant,
                options=options,
                ms=spread(ms),
                speedup={other: time / ms for other, time in times.items() if other != variant},
                bound_ms=bound,
                roofline_fraction=bound / ms,
                kv_bytes=int(kv * 1e6),
                peak_bytes=int((kv + 210) * 1e6),
                graphs=2 if ours else None,
                recompiles=1 if ours else None,
                compile_s={"cold": 24.4 if ours else None, "warm": None},
                predicted_ms=1.15 * bound if ours else None,
                fidelity=EMPTY_FIDELITY | {"max_abs_err_vs_fp32": 0.0353, "kl": values_kl(variant)},
            )
        )
    results += [
        result("flex", status="absent", reason="torch has no flex attention for this device"),
        result("torchaccel:h2o", status="declined", reason="needs attention weights, and the model is fused"),
        result("torchaccel:bad", options={"a": 1}, status="failed", reason="RuntimeError: out of memory"),
    ]
    return document("decode", results)


def values_kl(variant: str) -> float:
    return VARIANTS[variant][5]


def evaluate_document() -> dict[str, Any]:
    """Fidelity of the same variants, with every kind of detail."""
    results = []
    for variant, (options, ms, _, kv, ratio, kl, recall) in VARIANTS.items():
        results.append(
            result(
                variant,
                options=options,
                tpot_ms=spread(ms),
                ttft_ms=spread(12 * ms),
                speedup={other: values[1] / ms for other, values in VARIANTS.items() if other != variant},
                kv_bytes=int(kv * 1e5),
                fidelity=EMPTY_FIDELITY
                | {
                    "kl": kl,
                    "top1": 1 - kl / 3,
                    "perplexity": 12.3 * ratio,
                    "perplexity_ratio": ratio,
                    "perplexity_ratio_ci95": [ratio - (ratio - 1) / 5, ratio + (ratio - 1) / 5],
                    "bits_per_byte": 0.91,
                    "recall": {"needle": recall, "facts": recall * 0.9},
                },
                details=details(ratio, kl, recall, sensitive="int8" in variant),
            )
        )
    command = ["torchaccel", "evaluate", "--model", "demo", "--json", "-", "--options", '{"kv_compression": "int8"}']
    return document("evaluate", results, command=command)


def details(ratio: float, kl: float, recall: float, *, sensitive: bool) -> dict[str, Any]:
    lost = ratio - 1
    buckets = [
        {
            "from": 256 * i,
            "to": 256 * (i + 1),
            "perplexity": 12.3,
            "ratio": 1 + lost * i / 2,
            "ratio_ci95": [1 + lost * i / 3, 1 + lost * i / 1.5],
        }
        for i in range(4)
    ]
    lengths, depths = [256, 512, 1024], [0.0, 0.25, 0.5, 0.75, 1.0]
    scores = [[min(1.0, recall * (1.3 - 0.15 * i) + 0.1 * depth) for depth in depths] for i in range(len(lengths))]
    grid = {"lengths": lengths, "depths": depths, "scores": scores, "questions": 5}
    layers = [{"layer": i, "kl": kl * (1 + (i * 5) % 7) / 8, "perplexity_ratio": 1 + lost / (i + 1)} for i in range(12)]
    return {
        "perplexity": {"window": 1024, "windows": 12, "tokens": 12276, "bytes": 51234, "buckets": buckets},
        "agreement": {
            "tokens": 1000,
            "kl": kl,
            "top1": 0.98,
            "greedy_prefix": {"mean": 40.2, "min": 3, "of": 48, "prompts": 8},
        },
        "recall": {"needle": grid, "facts": grid},
        "sensitivity": {"metric": "kl", "layers": layers} if sensitive else None,
        "similarity": {"kind": "logits", "mean": 0.999, "min": 0.99, "texts": 40},
    }


def single_document() -> dict[str, Any]:
    """One variant with every kind of detail, and nothing to compare it with."""
    document = evaluate_document()
    (alone,) = [each for each in document["results"] if each["variant"] == "torchaccel:int8"]
    alone["details"]["sensitivity"]["layers"] = alone["details"]["sensitivity"]["layers"][:1]
    return document | {"results": [alone | {"speedup": None}]}


def null_document() -> dict[str, Any]:
    """One variant of which nothing is known, of a kind that nobody has heard of."""
    return document(
        "séance",
        [result("torchaccel:exact", compile_s=None, fidelity=None)],
        command=[],
        versions={},
        machine=None,
        model={},
        case={"kind": "séance"},
    )
