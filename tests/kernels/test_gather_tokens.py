"""Gathering the same tokens of several tensors: the reference by hand, C++ bit for bit, and the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import gather_reference, ops
from torchaccel.kernels.cpp import gather_tokens
from torchaccel.kernels.gather_spec import GatherSpec, TokenItem

from tests.kernels.gather_cases import SIZES, SPEC, gather_case

needs_compiler = pytest.mark.skipif(gather_tokens.supports(SPEC) is not None, reason=str(gather_tokens.supports(SPEC)))


def test_reference_by_hand() -> None:
    spec = GatherSpec((TokenItem(1, 8), TokenItem(2, 8, True)))
    x, mask = torch.tensor([[5, 6, 7]]), torch.arange(9).view(1, 1, 3, 3)
    rows, square = gather_reference.gather_tokens(spec, [x, mask], torch.tensor([[0, 2], [1, 2]]))
    assert rows.tolist() == [[5, 7], [6, 7]]
    assert square.tolist() == [[[[0, 2], [6, 8]]], [[[4, 5], [7, 8]]]]
    assert GatherSpec.from_key(spec.key()) == spec


@needs_compiler
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_bit_is_the_references(sizes: tuple[int, int, int], threads: int) -> None:
    inputs, index = gather_case(*sizes)
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # results are allocated full of NaN
    try:
        torch.set_num_threads(threads)
        got = gather_tokens.gather_tokens(SPEC)(inputs, index)
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(got, gather_reference.gather_tokens(SPEC, inputs, index), strict=True):
        assert ours.shape == theirs.shape and ours.is_contiguous() and torch.equal(ours, theirs)


@needs_compiler
@pytest.mark.parametrize("token", [-43, 42])
def test_a_token_that_does_not_exist_is_an_error(token: int) -> None:
    inputs, index = gather_case(3, 42, 5)
    index[1, 2] = token
    with pytest.raises(RuntimeError, match=f"token {token} is asked for"):
        gather_tokens.gather_tokens(SPEC)(inputs, index)


@needs_compiler
def test_errors_name_what_was_found() -> None:
    assert "found [16]" in (gather_tokens.supports(GatherSpec((TokenItem(1, 16),))) or "")
    inputs, index = gather_case(3, 42, 5)
    run = gather_tokens.gather_tokens(SPEC)
    with pytest.raises(ValueError, match=r"int64 .*; found torch.int32"):
        run(inputs, index.int())
    with pytest.raises(ValueError, match=r"1 or 2 rows; found \[3, 42, 33\]"):
        run(inputs, index[:2])
    with pytest.raises(ValueError, match="does not describe a tensor"):
        run([inputs[0].float(), *inputs[1:]], index)
    with pytest.raises(ValueError, match=r"as many tokens each; found \[41, 42\]"):
        run([inputs[0][:, 1:], *inputs[1:]], index)
    with pytest.raises(ValueError, match="must be the last and equal"):
        run([*inputs[:2], inputs[2][..., :40], *inputs[3:]], index)


@pytest.mark.parametrize("sizes", [(1, 6, 3), (3, 42, 17)])
def test_operator(sizes: tuple[int, int, int]) -> None:
    ops.library()
    inputs, index = gather_case(*sizes)
    torch.library.opcheck(torch.ops.torchaccel.gather_tokens.default, (inputs, index, SPEC.key()))


def test_one_graph_serves_all_lengths() -> None:
    ops.library()
    graphs = 0

    def count(gm: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return gm.forward

    def function(inputs: list[Tensor], index: Tensor) -> list[Tensor]:
        found: list[Tensor] = torch.ops.torchaccel.gather_tokens(inputs, index, SPEC.key())
        return [2 * x for x in found]

    torch._dynamo.reset()
    run = torch.compile(function, backend=count, dynamic=True)
    for tokens, kept in ((42, 17), (123, 6), (50, 49)):
        inputs, index = gather_case(2, tokens, kept)
        for ours, theirs in zip(run(inputs, index), function(inputs, index), strict=True):
            assert torch.equal(ours, theirs)
    assert graphs == 1
