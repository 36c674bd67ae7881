"""Prefill attention in Triton over a causal window and sinks: blocks outside them are never visited."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..spec import AttentionSpec
from .source import load, render
from .tiles import PRECISION, Tile, device_facts, prefill_tile
from .units import mask_strides, rows_in_units


def supports(spec: AttentionSpec) -> str | None:
    """Why this kernel cannot realise ``spec``, or None when it can."""
    if spec.phase != "prefill":
        return f"this kernel realises the phase 'prefill', not {spec.phase!r}"
    if not spec.causal:
        return "this kernel visits only keys at or before their query; the spec is not causal"
    if not 1 <= spec.head_dim <= 256:
        return f"head dimensions up to 256, not {spec.head_dim}"
    if spec.positions:
        return "fresh keys lie in order of their columns; the spec stores positions"
    if spec.softcap is not None and spec.softcap <= 0:
        return f"softcap must be positive, found {spec.softcap}"
    if spec.window is not None and spec.window < 1:
        return f"window must be at least 1, found {spec.window}"
    return None


def parameters(spec: AttentionSpec) -> list[str]:
    """Run-time parameters of the generated ``attend``, in order."""
    names = ["q", "k", "v", "out", "tokens"]
    names += [f"{x}_{dim}" for x in "qkv" for dim in "bht"]
    if spec.mask != "none":
        names += ["mask", "mask_b", "mask_h", "mask_q", "mask_c"]
    return names


@lru_cache(maxsize=512)
def generate(spec: AttentionSpec) -> str:
    """Triton source of ``spec``: one kernel, ``attend``."""
    names = parameters(spec)
    tensors = {"q", "k", "v", "out", "mask"}
    return render(
        "window_prefill.py.jinja",
        spec,
        parameters=names,
        scalars=", ".join(f'"{name}"' for name in names if name not in tensors and name != "mask_c"),
    )


class PrefillAttention:
    """A prefill attention kernel, called like the reference without its spec.

    Raises ValueError for a spec that ``supports`` declines.
    """

    def __init__(self, spec: AttentionSpec, tile: Tile | None = None) -> None:
        if reason := supports(spec):
            raise ValueError(f"no Triton window prefill for this spec: {reason}")
        self.spec = spec
        self.tile = tile

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of a whole prompt over itself.

        q: ``[B, H, S, D]``; k, v: ``[B, H_kv, S, D]``; mask: ``[B | 1, H | 1, S, S]``, bool or additive, any strides.
        Returns ``[B, H, S, D]``, contiguous, in q's dtype; rows that see no key are zero.
        """
        spec = self.spec
        if (mask is None) != (spec.mask == "none"):
            raise ValueError(f"a mask must be given exactly when the spec names one: {spec.key()}")
        batch, heads, tokens, d = q.shape
        family, _ = device_facts(q.device)
        tile = self.tile or prefill_tile(spec, family)
        module = load(generate(spec), "window_prefill")
        q, *q_strides = rows_in_units(q, d)
        k, *k_strides = rows_in_units(k, d)
        v, *v_strides = rows_in_units(v, d)
        out = q.new_empty(batch, heads, tokens, d)
        args: list[Any] = [q, k, v, out, tokens, *q_strides, *k_strides, *v_strides]
        constants: dict[str, Any] = {}
        if mask is not None:
            args += [mask, *mask_strides(mask)]
            if spec.mask == "additive" and spec.sinks and spec.window is not None:
                constants["MASK_FLOOR"] = torch.finfo(mask.dtype).min / 2
        with torch.cuda.device_of(q):
            module.attend[(-(-tokens // tile.block_m), heads, batch)](
                *args,
                BM=tile.block_m,
                BN=tile.block_n,
                PRECISION=PRECISION[family],
                num_warps=tile.warps,
                num_stages=tile.stages,
                **constants,
            )
        return out


@lru_cache(maxsize=512)
def prefill_attention(spec: AttentionSpec, tile: Tile | None = None) -> PrefillAttention:
    """The window prefill kernel of ``spec``; ``tile`` overrides the launch choices of the tables."""
    return PrefillAttention(spec, tile)
