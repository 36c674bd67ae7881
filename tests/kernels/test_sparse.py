"""MLPs over some neurons, and linear layers above a threshold: C++ against the reference, and the operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torchaccel.kernels import fused_reference, ops, sparse_reference
from torchaccel.kernels.cpp import linear, sparse_mlp, threshold_linear
from torchaccel.kernels.sparse_spec import SparseMlpSpec, ThresholdLinearSpec
from torchaccel.kernels.spec import DTYPES, LinearSpec

needs_compiler = pytest.mark.skipif(
    sparse_mlp.supports(SparseMlpSpec("float32", 1, "silu")) is not None,
    reason=str(sparse_mlp.supports(SparseMlpSpec("float32", 1, "silu"))),
)

# Relative to the largest result: float32 differs by the order of sums; with 16 bits the middle of an MLP is rounded,
# where the other side of a boundary moves a sum, and so is the result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.2e-2, "float16": 2e-3}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Results are allocated full of NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def numbers(dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPES[dtype])


def close(dtype: str, got: Tensor, expected: Tensor) -> bool:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = max(1e-3, expected.float().abs().max().item())
    return bool((got.float() - expected.float()).abs().max().item() <= TOLERANCE[dtype] * scale)


def weights(dtype: str, width: int, neurons: int, packed: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and transposed down, as one tensor or as three."""
    gate, up = (numbers(dtype, neurons, width) / width**0.5 for _ in range(2))
    found = sparse_reference.by_neuron(gate, up, numbers(dtype, width, neurons))
    return found if packed else tuple(weight.contiguous() for weight in found)  # type: ignore[return-value]


def test_reference_is_the_dense_layer_without_the_rest() -> None:
    """By hand, and all neurons against the layer as models write it."""
    spec = SparseMlpSpec("float32", 1, "relu")
    gate, up, down = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.ones(3, 2), torch.eye(3)[:, :2].contiguous()
    x = torch.tensor([[2.0, 3]])
    # relu(x0) * 5 to the first output, relu(x1) * 5 to the second, relu(-x0) = 0 to none.
    assert sparse_reference.sparse_mlp(spec, x, gate, up, down).tolist() == [[10.0, 15.0]]
    one = torch.tensor([[1, -1, 2]], dtype=torch.int32)
    assert sparse_reference.sparse_mlp(spec, x, gate, up, down, one).tolist() == [[0.0, 15.0]]
    packed = weights("float32", 42, 123)
    x, silu = torch.randn(2, 3, 42), fused_reference.FUNCTIONS["silu"]
    expected = (silu(x @ packed[0].T) * (x @ packed[1].T)) @ packed[2]
    torch.testing.assert_close(
        sparse_reference.sparse_mlp(SparseMlpSpec("float32", 6, "silu"), x, *packed), expected, atol=1e-5, rtol=1e-5
    )


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "activation"), [("float32", "gelu"), ("bfloat16", "silu"), ("float16", "gelu_tanh"), ("float32", "relu")]
)
def test_mlp_matches_the_reference(dtype: str, activation: Any) -> None:
    spec = SparseMlpSpec(dtype, 8, activation)
    run = sparse_mlp.sparse_mlp(spec)
    for rows, width, neurons, listed in (
        (1, 64, 777, 300),
        (3, 123, 42, 7),
        (8, 6, 5, 3),
        (2, 300, 333, 0),
        (5, 42, 6, 6),
    ):
        x = numbers(dtype, 1, rows, width, 2)[..., 1]
        for packed in (True, False):
            w = weights(dtype, width, neurons, packed)
            assert close(dtype, run(x, *w), sparse_reference.sparse_mlp(spec, x, *w))
            for lists in {1, rows}:
                index = torch.stack([torch.randperm(neurons)[:listed] for _ in range(lists)]).int()
                index[:, listed // 2 :: 3] = -1
                unread = torch.ones(neurons, dtype=torch.bool)
                unread[index[index >= 0].long()] = False
                poisoned = tuple(weight.clone() for weight in w)
                for weight in poisoned:
                    weight[unread] = torch.nan
                assert close(dtype, run(x, *poisoned, index), sparse_reference.sparse_mlp(spec, x, *w, index))


@needs_compiler
def test_a_neuron_that_does_not_exist_makes_its_row_nan() -> None:
    spec = SparseMlpSpec("bfloat16", 8, "silu")
    w, x = weights("bfloat16", 123, 42), numbers("bfloat16", 3, 123)
    index = torch.randint(0, 42, (3, 7), dtype=torch.int32)
    index[1, 3] = 42
    for run in (sparse_mlp.sparse_mlp(spec), lambda *args: sparse_reference.sparse_mlp(spec, *args)):
        y = run(x, *w, index)
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()
        assert run(x, *w, index[1:2]).isnan().all()
    x[0, 0] = torch.nan
    y = sparse_mlp.sparse_mlp(spec)(x, *w)
    assert y[0].isnan().all() and y[1:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_threshold_matches_the_reference(dtype: str) -> None:
    spec = ThresholdLinearSpec(dtype, 8, True)
    run = threshold_linear.threshold_linear(spec)
    for rows, k, n in ((1, 777, 300), (3, 42, 123), (8, 6, 1), (2, 123, 64)):
        x = numbers(dtype, 1, rows, k, 2)[..., 1]
        layers = [numbers(dtype, k, n), numbers(dtype, k, n + 31)]
        biases = [None, numbers(dtype, n + 31)]
        thresholds = [torch.full((1,), 0.7), 2 * torch.rand(2 * k)[::2]]
        for weight, threshold in zip(layers, thresholds, strict=True):
            weight[(x[0].float().abs() <= threshold).all(0)] = torch.nan
        expected = sparse_reference.threshold_linear(x, layers, biases, thresholds)
        for ours, theirs in zip(run(x, layers, biases, thresholds), expected, strict=True):
            assert theirs.isfinite().all() and close(dtype, ours, theirs)


@needs_compiler
def test_no_threshold_is_the_few_row_layer_and_equal_inputs_are_skipped() -> None:
    x, weight = torch.randint(-2, 3, (2, 123)).float(), torch.randint(-3, 4, (123, 42)).float()
    run = threshold_linear.threshold_linear(ThresholdLinearSpec("float32", 8, True))
    (dense,) = linear.linear(LinearSpec("float32", 2, False))(x, [weight.T.contiguous()], [None])
    assert torch.equal(run(x, [weight], [None], [torch.full((1,), -1.0)])[0], dense)
    # |x| above 1 are those that are 2: up to the threshold counts as zero.
    (large,) = run(x, [weight], [None], [torch.ones(1)])
    assert torch.equal(large, torch.where(x.abs() == 2, x, 0) @ weight)
    assert not run(x, [weight], [None], [torch.full((1,), 9.0)])[0].any()
    x[0, 5] = torch.nan
    assert run(x, [weight], [None], [torch.ones(1)])[0][0].isnan().all()


@needs_compiler
def test_threads_and_empty_rows() -> None:
    w, x = weights("bfloat16", 123, 777), numbers("bfloat16", 2, 123)
    index = torch.randperm(777)[None, :301].int()
    mlp = sparse_mlp.sparse_mlp(SparseMlpSpec("bfloat16", 8, "silu"))
    layer = threshold_linear.threshold_linear(ThresholdLinearSpec("bfloat16", 8, True))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([mlp(x, *w, index), *layer(x, [w[0].T.contiguous()], [None], [torch.full((1,), 0.5)])])
    finally:
        torch.set_num_threads(threads)
    # Each thread has sums of its own, so the order of summation differs.
    assert all(close("bfloat16", a, b) for a, b in zip(*results, strict=True))
    assert mlp(x[:0], *w, index).shape == (0, 123)
    assert layer(x[:0], [w[0].T.contiguous()], [None], [torch.ones(1)])[0].shape == (0, 777)


@needs_compiler
def test_errors_name_what_was_found() -> None:
    assert "1 to 8 rows" in (sparse_mlp.supports(SparseMlpSpec("bfloat16", 9, "silu")) or "")
    assert "knows the dtypes" in (threshold_linear.supports(ThresholdLinearSpec("float64", 1, False)) or "")
    with pytest.raises(ValueError, match="1 to 8 rows"):
        sparse_mlp.sparse_mlp(SparseMlpSpec("bfloat16", 9, "silu"))
    mlp = sparse_mlp.sparse_mlp(SparseMlpSpec("bfloat16", 8, "silu"))
    w, x = weights("bfloat16", 64, 42), numbers("bfloat16", 2, 64)
    with pytest.raises(ValueError, match="at most 8 rows; found 9"):
        mlp(numbers("bfloat16", 9, 64), *w)
    with pytest.raises(ValueError, match=r"contiguous rows; found torch.bfloat16 .*64, 42"):
        mlp(x, w[0], w[1], w[2].T)
    with pytest.raises(ValueError, match=r"int32 \[1 or 2, K\]; found torch.int64"):
        mlp(x, *w, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x in bfloat16; found torch.float32"):
        mlp(x.float(), *w)
    layer = threshold_linear.threshold_linear(ThresholdLinearSpec("bfloat16", 8, True))
    with pytest.raises(ValueError, match="contiguous bfloat16 weights"):
        layer(x, [w[0].T], [None], [torch.ones(1)])
    with pytest.raises(ValueError, match=r"float32 \[1\] or \[64\]; found torch.float32 \[3\]"):
        layer(x, [w[0].T.contiguous()], [None], [torch.ones(3)])


@pytest.mark.parametrize("rows", [2, 9])
def test_operators(rows: int) -> None:
    """More rows than the kernels take run on the reference."""
    ops.library()
    w, x = weights("bfloat16", 64, 42), numbers("bfloat16", 1, rows, 64)
    index = torch.randint(0, 42, (1, 20), dtype=torch.int32)
    for neurons in (None, index):
        torch.library.opcheck(torch.ops.torchaccel.sparse_mlp.default, (x, *w, neurons, "silu"))
    layers = [weight.T.contiguous() for weight in w[:2]]
    arguments = (x, layers, [None, torch.ones(42).bfloat16()], [torch.full((1,), 0.5), torch.rand(64)])
    torch.library.opcheck(torch.ops.torchaccel.threshold_linear.default, arguments)


def test_one_graph_serves_all_lists() -> None:
    """Lists of another width, and other thresholds, are data: nothing is compiled again."""
    ops.library()
    graphs = 0

    def count(gm: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return gm.forward

    def function(x: Tensor, w: tuple[Tensor, ...], index: Tensor, threshold: Tensor) -> Tensor:
        (y,) = torch.ops.torchaccel.threshold_linear(x, [w[0].T.contiguous()], [None], [threshold])
        return torch.ops.torchaccel.sparse_mlp(x, *w, index, "silu").sum() + y.sum()

    torch._dynamo.reset()
    run = torch.compile(function, backend=count, dynamic=True)
    w, x = weights("bfloat16", 64, 42), numbers("bfloat16", 2, 64)
    for width in (6, 42, 17):
        arguments = x, w, torch.randperm(42)[None, :width].int(), torch.rand(1)
        assert torch.equal(run(*arguments), function(*arguments))
    assert graphs == 1
