"""One new token over a long cache: dense, quantised, and a sixteenth of it chosen by page summaries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import registry, selection_reference
from ...kernels.selection_spec import SelectionSpec, SummarySpec
from .contender import Contender, Goal, Scenario, copies, stored
from .geometry import DTYPE, Geometry

PAGE = 64
SHARE = 16
LAYERS = 12


def scenario(g: Geometry, *, flex: bool) -> Scenario:
    """Append a token and attend; ``flex`` lets compiled flex_attention take part, which costs half a minute."""
    q = g.normal(1, g.heads, 1)
    token_bytes = 2 * g.kv_heads * g.head_dim * 2
    contents = [
        (g.normal(1, g.kv_heads, g.decode), g.normal(1, g.kv_heads, g.decode))
        for _ in range(copies(g.decode * token_bytes, g.device))
    ]
    flops = 4.0 * g.heads * g.decode * g.head_dim
    k, v = (t.float() for t in contents[0])
    truth = F.scaled_dot_product_attention(q.float(), k, v, scale=g.head_dim**-0.5, enable_gqa=True)
    found = [_stock("sdpa", F.scaled_dot_product_attention, g, q, contents)]
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        found.append(_stock("flex", torch.compile(flex_attention, dynamic=False), g, q, contents))
    for kind, label in (("dense", "exact"), ("int8", "int8"), ("int4", "int4"), ("int2", "int2")):
        found.append(_kernel(g, f"torchaccel:{label}", kind, q, contents))
    found.append(_sparse(g, q, contents))
    for contender in found:
        contender.flops = flops * (contender.density or 1.0)
        contender.error = _error(contender.calls[0](), truth)
    return Scenario(f"decode {g.decode}", found, partial(_goals, found), 15, burst=LAYERS)


def _goals(found: Sequence[Contender], read_gbs: float) -> list[Goal]:
    exact = next(c for c in found if c.label == "torchaccel:exact")
    limit = exact.read_bytes / read_gbs / 1e6

    def over_exact(label: str) -> Any:
        return lambda ms: ms["torchaccel:exact"] / ms[label]

    return [
        Goal(exact.label, "of the read bandwidth", 0.75, lambda ms: limit / ms[exact.label]),
        Goal("torchaccel:int4", "times exact", 2.2, over_exact("torchaccel:int4")),
        Goal("torchaccel:pages", "times exact, with selection", 6.0, over_exact("torchaccel:pages")),
    ]


def _error(result: Any, truth: Tensor) -> float:
    return float((result.float() - truth).abs().max())


def _stock(label: str, run: Any, g: Geometry, q: Tensor, contents: Sequence[tuple[Tensor, Tensor]]) -> Contender:
    calls = [partial(run, q, k, v, scale=g.head_dim**-0.5, enable_gqa=True) for k, v in contents]
    return Contender(label, calls, sum(t.nbytes for t in contents[0]), 0.0)


def _kernel(g: Geometry, label: str, kind: str, q: Tensor, contents: Sequence[tuple[Tensor, Tensor]]) -> Contender:
    """A call writes the last token of its content once more, and attends to all."""
    spec = g.spec("decode", kind)
    run, length = g.seed(spec), g.decode - 1
    lens = torch.tensor([0, length, length])
    size = g.kv_heads * g.decode * (spec.key_format.token_bytes + spec.value_format.token_bytes)
    calls = []
    for k, v in _enough(contents, copies(size, g.device)):
        keys, values = stored(spec.key_format, k[:, :, :length]), stored(spec.value_format, v[:, :, :length])
        calls.append(partial(run, q, k[:, :, length:], v[:, :, length:], keys, values, lens, None, None))
    return Contender(label, calls, size, 0.0)


def _sparse(g: Geometry, q: Tensor, contents: Sequence[tuple[Tensor, Tensor]]) -> Contender:
    """Quest's pages of 64: summaries of the new key, scores, choice and attention are all in the call."""
    spec = g.spec("decode", index="blocks", index_block=PAGE)
    summary_spec = SummarySpec("minmax", g.head_dim, DTYPE, DTYPE, PAGE)
    width = max(2, g.decode // PAGE // SHARE)  # the first and the last page always
    chosen = SelectionSpec(summary_spec, g.group, DTYPE, width, sinks=1, recent=1)
    run = g.seed(spec)
    summarise = registry.summarise(summary_spec, g.device.type).run
    select = registry.select(chosen, g.device.type).run
    length = g.decode - 1
    lens = torch.tensor([0, length, length])
    after = lens + 1
    calls = []
    size = g.kv_heads * width * PAGE * 2 * g.head_dim * 2 + g.kv_heads * g.decode // PAGE * 2 * g.head_dim * 2
    for k, v in _enough(contents, copies(size, g.device)):
        keys, values = stored(spec.key_format, k[:, :, :length]), stored(spec.value_format, v[:, :, :length])
        summary, sums = selection_reference.allocate(summary_spec, 1, g.kv_heads, g.decode + 1, g.device)
        summarise(k[:, :, :length], summary, sums, torch.zeros(3, dtype=torch.int64))
        k_new, v_new = k[:, :, length:], v[:, :, length:]

        def call(keys: Tensor = keys, values: Tensor = values, summary: Tensor = summary, sums: Tensor = sums,
                 k_new: Tensor = k_new, v_new: Tensor = v_new) -> Any:  # fmt: skip
            summarise(k_new, summary, sums, lens)
            index = select(q, summary, after)
            return run(q, k_new, v_new, keys, values, lens, None, None, index)

        calls.append(call)
    return Contender("torchaccel:pages", calls, size, 0.0, density=width * PAGE / g.decode)


def _enough(contents: Sequence[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """At least ``count`` contents, the given ones again and again: each is stored in a buffer of its own."""
    return [contents[i % len(contents)] for i in range(max(count, len(contents)))]
