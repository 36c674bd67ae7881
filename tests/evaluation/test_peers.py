"""Peers in processes of their own: the line protocol with a fake peer, byte budgets, and kvpress where it is built."""

from __future__ import annotations

import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from torchaccel.errors import PeerError
from torchaccel.evaluation.baselines import kvpress
from torchaccel.evaluation.baselines.child import Child, serve
from torchaccel.evaluation.baselines.kvpress import KVPress, RemoteModel, equal_bytes_ratio
from torchaccel.evaluation.bench import Setup, run_bench
from torchaccel.evaluation.case import Case
from torchaccel.evaluation.models import LoadedModel, model_facts
from torchaccel.evaluation.results import Result
from torchaccel.evaluation.runners import parse_baselines
from torchaccel.evaluation.variants import torchaccel_variants

from .schema import check_document
from .tiny import save_tiny_model, tiny_model

FAKE = str(Path(__file__).with_name("fake_peer.py"))
PROMPT = torch.tensor([[3, 4, 5]])


def fake(manner: str) -> Child:
    child = Child([sys.executable, FAKE, manner])
    child.ask({"do": "load"}, 30)
    return child


def ask(child: Child, seconds: float = 30) -> dict[str, Any]:
    return child.ask({"do": "sample", "prompt": [[1]], "new_tokens": 2}, seconds)


def test_an_obedient_child_answers_again_and_again() -> None:
    child = fake("obey")
    assert [ask(child)["tokens"] for _ in range(3)] == [[[7, 7]]] * 3


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("die", "ended with exit code 3: out of memory in the peer"),
        ("garbage", "answered 'Downloading 3 files...', which is no JSON object"),
        ("list", r"answered '\[1, 2\]', which is no JSON object"),
    ],
)
def test_a_misbehaving_child_is_an_error_that_says_how(manner: str, message: str) -> None:
    child = fake(manner)
    with pytest.raises(PeerError, match=message):
        ask(child)
    with pytest.raises(PeerError, match="ended after an earlier failure"):
        ask(child)


def test_a_hanging_child_is_killed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchaccel.evaluation.baselines.child.GRACE_SECONDS", 0.1)
    child = fake("hang")
    started = time.monotonic()
    with pytest.raises(PeerError, match="did not answer within 1 s"):
        ask(child, seconds=1)
    assert time.monotonic() - started < 20
    assert child._process.returncode is not None


def test_an_error_of_the_peer_does_not_end_it() -> None:
    child = fake("refuse")
    for _ in range(2):
        with pytest.raises(PeerError, match="this press needs a question"):
            ask(child)


def test_a_child_ends_with_whoever_asked_it() -> None:
    child = fake("obey")
    process = child._process
    del child
    assert process.wait(30) == 0


def test_a_command_that_cannot_start_is_an_error() -> None:
    child = Child([sys.executable, "-c", "raise SystemExit('no such module')"])
    with pytest.raises(PeerError, match="no such module"):
        child.ask({"do": "load"}, 30)


def test_serving_answers_every_line_and_tells_errors() -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["n"] == 0:
            raise ZeroDivisionError("by zero\nmore")
        return {"half": 4 / request["n"]}

    answers = StringIO()
    serve(answer, StringIO('{"n": 2}\n{"n": 0}\n{"n": 4}\n'), answers)
    assert answers.getvalue().splitlines() == [
        '{"half": 2.0}',
        '{"error": "ZeroDivisionError: by zero"}',
        '{"half": 1.0}',
    ]


def test_a_remote_model_generates_like_a_model() -> None:
    remote = RemoteModel(tiny_model(), [sys.executable, FAKE, "obey"], {"press": "SnapKVPress"})
    assert remote.versions["seen"] == ["device", "do", "folder", "press", "threads"]
    found = remote.sample(PROMPT, 2)
    assert (found.tokens.tolist(), found.ms, found.kv_bytes) == ([[7, 7]], 9.0, 1234)
    generated = remote.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=2, do_sample=False)
    assert generated.tolist() == [[3, 4, 5, 7, 7]]
    assert remote.peak(PROMPT, 2) == 5678
    assert next(remote.parameters()).device == torch.device("cpu")


def test_equal_bytes_keep_as_many_tokens_as_the_budget_holds() -> None:
    facts = model_facts(LoadedModel("tiny", tiny_model(), None))
    case = Case("generate", context=100, new_tokens=11)
    token = 2 * 1 * 2 * 16 * 4
    assert equal_bytes_ratio(60 * token, facts, case) == pytest.approx(0.5)
    assert equal_bytes_ratio(10_000 * token, facts, case) == 0.0
    assert equal_bytes_ratio(token, facts, case) == 0.99


def test_the_budget_is_that_of_our_first_compressed_cache() -> None:
    facts = model_facts(LoadedModel("tiny", tiny_model(), None))
    case = Case("generate", context=100, new_tokens=11)
    ours = Result("torchaccel:int8", {"kv_compression": "int8"}, kv_bytes=60 * 256)
    free, given = KVPress({"press": "snapkv"}), KVPress({"press": "snapkv", "compression_ratio": 0.25})
    for runner in (free, given):
        runner.settle([Result("eager", {}, kv_bytes=1), ours], facts, case)
    assert free.options == {"press": "snapkv", "compression_ratio": 0.5, "budget": "torchaccel:int8"}
    assert given.options["compression_ratio"] == 0.25
    alone = KVPress({"press": "snapkv"})
    alone.settle([], facts, case)
    assert alone.options["budget"] == "default"


def run(folder: Path, baselines: str, case: Case) -> dict[str, dict[str, Any]]:
    setup = Setup(str(folder), "cpu", cold=False, probe_megabytes=8, probe_gemm=128)
    variants = [*parse_baselines(baselines), *torchaccel_variants([])]
    document = run_bench(case, variants, setup, [])
    check_document(document)
    return {result["variant"]: result for result in document["results"]}


CASE = Case("generate", context=100, new_tokens=4, rounds=2, warmup=0)


def test_without_its_environment_kvpress_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvpress, "environment", lambda: tmp_path / "nowhere")
    found = run(save_tiny_model(tmp_path), "kvpress:snapkv,eager", CASE)
    assert found["kvpress:snapkv"]["status"] == "absent"
    assert "make peers" in found["kvpress:snapkv"]["reason"]
    assert found["eager"]["status"] == "ok"


def test_a_dying_peer_is_a_failed_variant_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self: KVPress, model: Any, case: str) -> RemoteModel:
        return RemoteModel(model, [sys.executable, FAKE, "die"], {})

    monkeypatch.setattr(KVPress, "absent", lambda self: None)
    monkeypatch.setattr(KVPress, "build", build)
    found = run(save_tiny_model(tmp_path), "eager,kvpress:snapkv", CASE)
    assert found["kvpress:snapkv"]["status"] == "failed"
    assert "out of memory in the peer" in found["kvpress:snapkv"]["reason"]
    assert found["eager"]["ttft_ms"]["n"] == 2


@pytest.fixture
def built() -> Path:
    reason = KVPress({}).absent()
    if reason is not None:
        pytest.skip(reason)
    return kvpress.environment()


def test_every_press_exists(built: Path) -> None:
    code = f"import kvpress; print([p for p in {sorted(sum(kvpress.PRESSES.values(), ()))} if not hasattr(kvpress, p)])"
    command = [str(built / "bin" / "python"), "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["[]"]


def test_kvpress_keeps_the_tokens_of_its_ratio(built: Path, tmp_path: Path) -> None:
    found = run(save_tiny_model(tmp_path), "eager,kvpress:knorm:0.5", CASE)["kvpress:knorm:0.5"]
    assert found["status"] == "ok", found
    assert found["kv_bytes"] == 2 * 2 * 16 * 4 * (50 + 4 - 1)
    assert found["ttft_ms"]["n"] == 2
    assert found["peak_bytes"] > found["kv_bytes"]


def test_kvpress_adakv_masks_and_frees_nothing_while_h2o_frees(built: Path, tmp_path: Path) -> None:
    found = run(save_tiny_model(tmp_path), "eager,kvpress:adakv:0.5,kvpress:h2o:0.5", CASE)
    every, kept = (2 * 2 * 16 * 4 * (tokens + 4 - 1) for tokens in (100, 50))
    assert [found[f"kvpress:{press}:0.5"]["kv_bytes"] for press in ("adakv", "h2o")] == [every, kept], found
