"""The attention suite on sizes that take a second: every scenario has its contenders, errors and judged goals."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from tests.evaluation.schema import check_document
from torchaccel.evaluation.suites.run import Suite, run_suite
from torchaccel.evaluation.suites.table import suite_table

TINY = Suite("cpu", decode=4096, prefill=512, prefix=256, mlp=256)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_suite("cpu", ["torchaccel"], baselines=["sdpa"], suite=TINY)


def test_every_scenario_is_in_the_document(found: dict[str, Any]) -> None:
    check_document(found)
    assert found["case"]["suite"] == "cpu"
    variants = {result["variant"] for result in found["results"]}
    assert {"sdpa@decode 4096", "torchaccel:int4@decode 4096", "torchaccel:pages@decode 4096"} <= variants
    assert {"torchaccel:blocks@prefill 512", "torchaccel:shared@shared prefix 256 x 16, group 3"} <= variants
    assert {"torchaccel:half@mlp 256 x 1024", "torchaccel:threshold@mlp 256 x 1024"} <= variants
    assert all(result["status"] == "ok" and result["ms"]["median"] > 0 for result in found["results"])


def test_exact_kernels_are_as_close_to_float32_as_stock_ones(found: dict[str, Any]) -> None:
    errors = {r["variant"]: r["fidelity"]["max_abs_err_vs_fp32"] for r in found["results"]}
    for scenario in ("decode 4096", "prefill 512"):
        assert errors[f"torchaccel:exact@{scenario}"] <= 2 * errors[f"sdpa@{scenario}"]
    # Random content has no structure: fewer bits, and fewer keys, cost more each.
    ordered = [errors[f"torchaccel:{kind}@decode 4096"] for kind in ("exact", "int8", "int4", "int2")]
    assert ordered == sorted(ordered)


def test_goals_say_what_was_asked_and_reached(found: dict[str, Any]) -> None:
    goals = {r["variant"]: r["details"]["goals"] for r in found["results"] if r["details"]["goals"]}
    assert len(goals) == 10
    for (goal,) in goals.values():
        assert goal["ok"] == (goal["reached"] >= goal["asked"])
    console = Console(width=220, record=True)
    console.print(suite_table(found))
    assert "times sdpa" in console.export_text()


def test_unknown_suites_and_absent_devices_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown suite 'tpu'; the suites are cpu, gpu"):
        run_suite("tpu", [])
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            run_suite("gpu", [])
