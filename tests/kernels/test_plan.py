"""Plans: text and back, the pick for every length, and what runs when a pick cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchaccel.kernels import candidates, ops, reference, registry
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.spec import AttentionSpec, KVFormat

DENSE = KVFormat("dense", "float32", 16)
SPEC = AttentionSpec("decode", 16, 2, "float32", DENSE, DENSE, 0.25)


def arguments(length: int) -> list[Any]:
    torch.manual_seed(length)
    k_buf, v_buf = torch.full((2, 1, 3, length + 4, 16), torch.nan)
    k_buf[:, :, :length], v_buf[:, :, :length] = torch.randn(2, 1, 3, length, 16)
    q, k_new, v_new = torch.randn(1, 6, 1, 16), torch.randn(1, 3, 1, 16), torch.randn(1, 3, 1, 16)
    return [q, k_new, v_new, k_buf, v_buf, torch.tensor([0, length, length]), None, None]


def test_text_and_back() -> None:
    plan = Plan(SPEC, ((10, Candidate("reference")), (None, Candidate("cpp", (("split", "kv"),)))))
    assert Plan.from_key(plan.key()) == plan
    assert [plan.pick(tokens).implementation for tokens in (0, 10, 11)] == ["reference", "reference", "cpp"]
    with pytest.raises(ValueError, match="unknown implementation 'fortran'"):
        Candidate.from_key("fortran")


def test_the_pick_follows_the_stored_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(spec: AttentionSpec, candidate: Candidate) -> Any:
        def run(*args: Any) -> str:
            built.append(candidate.key())
            return candidate.key()

        return run

    monkeypatch.setattr(registry, "build", build)
    registry.attend.cache_clear()
    plan = Plan(SPEC, ((10, Candidate("reference")), (None, Candidate("composed")))).key()
    assert [registry.attend(plan)(*arguments(length)) for length in (10, 11)] == ["reference", "composed"]
    prompt = Plan(SPEC, ((10, Candidate("composed")), (None, Candidate("reference")))).key()
    tokens = [torch.zeros(1, 3, n, 16) for n in (10, 11)]
    assert [registry.attend_prompt(prompt)(None, k, k, None) for k in tokens] == ["composed", "reference"]
    registry.attend.cache_clear()
    registry.attend_prompt.cache_clear()


def test_what_cannot_be_built_is_replaced_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = candidates.build

    def build(spec: AttentionSpec, candidate: Candidate) -> Any:
        if candidate.implementation == "cpp":
            raise RuntimeError("no space left\non the disk")
        return real(spec, candidate)

    monkeypatch.setattr(registry, "build", build)
    registry.attend.cache_clear()
    plan = Plan(SPEC, ((None, Candidate("cpp")),)).key()
    with pytest.warns(UserWarning, match="cpp could not be built .RuntimeError: no space left.; stock operators"):
        got = registry.attend(plan)(*arguments(5))
    registry.attend.cache_clear()
    want = reference.decode_attention(SPEC, *arguments(5))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_operators_with_lists_and_side_results() -> None:
    ops.library()
    spec = AttentionSpec("decode", 16, 2, "float32", DENSE, DENSE, 0.25, index="tokens", lse=True, mass=True)
    plan = Plan(spec, ((None, Candidate("reference")),)).key()
    index = torch.tensor([[[3, 0, -1]] * 3], dtype=torch.int32)
    got = torch.ops.torchaccel.attend_with(*arguments(9), index, None, plan)
    want = reference.decode_attention(spec, *arguments(9), index, None)
    assert len(got) == 3
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    buffers = arguments(9)
    for buf in buffers[3:5]:
        buf[:, :, 9:] = 0.0  # opcheck compares what is never read, too
    torch.library.opcheck(torch.ops.torchaccel.attend_with.default, (*buffers, index, None, plan))
    prefill = AttentionSpec("prefill", 16, 2, "float32", DENSE, DENSE, 0.25, index="blocks", index_block=16, lse=True)
    q, k = torch.randn(1, 6, 20, 16), torch.randn(1, 3, 20, 16)
    lists = torch.tensor([[[[0, -1], [0, 1]]] * 6], dtype=torch.int32)
    args = (q, k, k, None, lists, None, Plan(prefill, ((None, Candidate("reference")),)).key())
    torch.library.opcheck(torch.ops.torchaccel.attend_prompt_with.default, args)
    out, lse, mass = torch.ops.torchaccel.attend_prompt_with(*args)
    want = reference.prefill_attention(prefill, *args[:-1])
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and mass.numel() == 0


def test_unsupported_says_why() -> None:
    assert candidates.unsupported(SPEC, "cpu") is None or "compiler" in str(candidates.unsupported(SPEC, "cpu"))
    assert candidates.unsupported(SPEC, "xpu") == "no generated kernels for device xpu"
    assert candidates.candidates(SPEC, "xpu") == (Candidate("composed"), Candidate("reference"))
