"""The results document as a checklist: which keys there are, and what may stand in them."""

from __future__ import annotations

from typing import Any

NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
SPREAD = {"median": NUMBER, "min": NUMBER, "max": NUMBER, "n": int}
MACHINE = {
    "device": str,
    "cores": int,
    "read_gbs": NUMBER,
    "copy_gbs": NUMBER,
    "gemm_gflops": dict,
    "load_before": OPTIONAL_NUMBER,
    "load_after": OPTIONAL_NUMBER,
    "busy": bool,
}
MODEL = {
    "name": str,
    "params": int,
    "weight_bytes": int,
    "dtype": str,
    "layers": int,
    "heads": int,
    "kv_heads": int,
    "head_dim": int,
}
FIDELITY = {
    "max_abs_err_vs_fp32": OPTIONAL_NUMBER,
    "eager_max_abs_err_vs_fp32": OPTIONAL_NUMBER,
    "kl": OPTIONAL_NUMBER,
    "top1": OPTIONAL_NUMBER,
    "greedy_prefix": OPTIONAL_NUMBER,
    "perplexity": OPTIONAL_NUMBER,
    "perplexity_ratio": OPTIONAL_NUMBER,
    "perplexity_ratio_ci95": (list, type(None)),
    "bits_per_byte": OPTIONAL_NUMBER,
    "recall": (dict, type(None)),
}
RESULT = {
    "variant": str,
    "options": dict,
    "effective": (dict, type(None)),
    "status": str,
    "reason": (str, type(None)),
    "ms": (dict, type(None)),
    "ttft_ms": (dict, type(None)),
    "tpot_ms": (dict, type(None)),
    "speedup": (dict, type(None)),
    "bound_ms": OPTIONAL_NUMBER,
    "roofline_fraction": OPTIONAL_NUMBER,
    "kv_bytes": (int, type(None)),
    "peak_bytes": (int, type(None)),
    "graphs": (int, type(None)),
    "recompiles": (int, type(None)),
    "compile_s": dict,
    "predicted_ms": OPTIONAL_NUMBER,
    "fidelity": dict,
    "density": OPTIONAL_NUMBER,
    "details": (dict, type(None)),
}
METHOD = {
    "family": str,
    "method": str,
    "aliases": list,
    "fidelity": str,
    "phases": list,
    "calibration": str,
    "paper": str,
    "options_schema": dict,
}
VERSIONS = dict.fromkeys(("torchaccel", "torch", "triton", "transformers", "python", "compiler"), (str, type(None)))
DOCUMENT = {"command": list, "versions": dict, "machine": dict, "model": dict, "case": dict, "results": list}


def check_document(found: dict[str, Any]) -> None:
    """Assert that ``found`` has exactly the documented keys and that every value has the documented type."""
    _check(found, DOCUMENT, "document")
    _check(found["versions"], VERSIONS, "versions")
    _check(found["machine"], MACHINE, "machine")
    _check(found["model"], MODEL, "model")
    assert {"kind", "batch", "context", "new_tokens"} <= set(found["case"])
    for result in found["results"]:
        name = result["variant"]
        _check(result, RESULT, name)
        _check(result["fidelity"], FIDELITY, f"{name} fidelity")
        _check(result["compile_s"], dict.fromkeys(("cold", "warm"), OPTIONAL_NUMBER), f"{name} compile_s")
        assert result["status"] in ("ok", "absent", "declined", "failed")
        assert (result["reason"] is None) == (result["status"] == "ok"), f"{name}: a reason belongs to a trouble"
        for times in ("ms", "ttft_ms", "tpot_ms"):
            if result[times] is not None:
                _check(result[times], SPREAD, f"{name} {times}")


def check_methods(found: list[dict[str, Any]]) -> None:
    """Assert the shape of what ``torchaccel methods --json`` prints."""
    assert found
    for row in found:
        _check(row, METHOD, row.get("method", "?"))
        assert row["fidelity"] in ("exact", "approx")
        assert row["calibration"] in ("none", "optional", "required")


def _check(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    assert set(found) == set(wanted), f"{where}: {set(found) ^ set(wanted)}"
    for key, types in wanted.items():
        assert isinstance(found[key], types), f"{where}.{key} is {found[key]!r}"
