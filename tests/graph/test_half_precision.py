"""On the CPU no matrix product is left in float16, and results stay those of the model."""

from __future__ import annotations

import pytest
import torch
from torchaccel.passes.canonicalize.attention import canonicalize_attention
from torchaccel.passes.canonicalize.half_precision import upcast_half

from tests.graph.capture import Captured, capture_encoder, capture_phase
from tests.models.families import build
from torchaccel.graph import canonical
from torchaccel.graph.nodes import op_name


def upcast(found: Captured) -> tuple[int, torch.fx.GraphModule]:
    module = found.copy()
    canonicalize_attention(module.graph)
    count = len(upcast_half(module.graph))
    module.recompile()
    return count, module


@pytest.mark.parametrize(
    ("name", "phase", "products"),
    [("llama", "prefill", 17), ("llama", "static", 17), ("gpt2", "decode", 11), ("bert", "encoder", 15)],
)
def test_products_run_in_float32(name, phase, products):
    half = build(name, layers=2, dtype=torch.float16)
    found = capture_encoder(half) if phase == "encoder" else capture_phase(half, phase)
    count, module = upcast(found)
    assert count == products
    for node in module.graph.nodes:
        if op_name(node) in ("linear", "addmm") or node.target is canonical.attention:
            assert node.meta["example_value"].dtype == torch.float32
    outputs = found.run(module)
    for before, after in zip(found.run(), outputs, strict=True):
        assert after.dtype == before.dtype
        torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_left_alone(dtype):
    found = capture_phase(build("llama", layers=1, dtype=dtype), "prefill")
    assert upcast(found)[0] == 0
