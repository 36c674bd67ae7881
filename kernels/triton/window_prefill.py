"""Prefill attention in Triton over a causal window and sinks, or listed blocks: what lies outside is never visited."""

from __future__ import annotations

from dataclasses import fields, replace
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
    if not 1 <= spec.head_dim <= 256:
        return f"head dimensions up to 256, not {spec.head_dim}"
    if spec.positions:
        return "fresh keys lie in order of their columns; the spec stores positions"
    if spec.index == "tokens":
        return "prefill reads lists of blocks, not of tokens"
    if spec.index == "blocks" and (spec.index_block < 16 or spec.index_block % 16):
        return f"lists of blocks of a multiple of 16 tokens, not {spec.index_block}"
    if spec.softcap is not None and spec.softcap <= 0:
        return f"softcap must be positive, found {spec.softcap}"
    if spec.window is not None and spec.window < 1:
        return f"window must be at least 1, found {spec.window}"
    return None


def configs(spec: AttentionSpec) -> tuple[tuple[tuple[str, int | str], ...], ...]:
    """The launch choices worth a try, the tables' own first and one step from it in each direction behind it."""
    family, _ = device_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    seed = _fitted(prefill_tile(spec, family), spec)
    widest = _widest(spec) or 128
    found = [seed]
    found += [replace(seed, block_m=m) for m in (seed.block_m // 2, seed.block_m * 2) if 16 <= m <= widest]
    found += [replace(seed, block_n=n) for n in (seed.block_n // 2, seed.block_n * 2) if 16 <= n <= widest]
    found += [replace(seed, warps=warps) for warps in (4, 8) if warps != seed.warps]
    found += [replace(seed, stages=stages) for stages in (1, 2, 3, 4) if abs(stages - seed.stages) == 1]
    return tuple(
        (("block_m", c.block_m), ("block_n", c.block_n), ("stages", c.stages), ("warps", c.warps)) for c in found
    )


def _widest(spec: AttentionSpec) -> int | None:
    """Tokens that both sides of a tile can have at most: one of a list has the queries and keys of one entry."""
    return spec.index_block & -spec.index_block if spec.index == "blocks" else None


def _fitted(tile: Tile, spec: AttentionSpec) -> Tile:
    widest = _widest(spec)
    if widest is None:
        return tile
    return replace(tile, block_m=min(tile.block_m, widest), block_n=min(tile.block_n, widest))


def parameters(spec: AttentionSpec) -> list[str]:
    """Run-time parameters of the generated ``attend``, in order."""
    lse = ["lse"] if spec.lse or spec.mass else []
    return ["q", "k", "v", "out", *lse, "tokens", *(f"{x}_{dim}" for x in "qkv" for dim in "bht"), *_selection(spec)]


def weigh_parameters(spec: AttentionSpec) -> list[str]:
    """Run-time parameters of the generated ``weigh``, in order."""
    return ["q", "k", "lse", "mass", "tokens", *(f"{x}_{dim}" for x in "qk" for dim in "bht"), *_selection(spec)]


def _selection(spec: AttentionSpec) -> list[str]:
    """The parameters that say which keys a query sees."""
    mask = ["mask", "mask_b", "mask_h", "mask_q", "mask_c"] if spec.mask != "none" else []
    lists = ["index", "index_b", "index_h", "index_q", "entries"] if spec.index == "blocks" else []
    return mask + lists + (["head_windows"] if _by_head(spec) else [])


def _by_head(spec: AttentionSpec) -> bool:
    return spec.head_windows and spec.window is not None


_TENSORS = {"q", "k", "v", "out", "lse", "mass", "mask", "index", "head_windows"}


def _scalars(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names if name not in _TENSORS and name != "mask_c")


@lru_cache(maxsize=512)
def generate(spec: AttentionSpec) -> str:
    """Triton source of ``spec``: ``attend``, and ``weigh`` for mass."""
    return render(
        "window_prefill.py.jinja",
        spec,
        parameters=parameters(spec),
        weigh_parameters=weigh_parameters(spec),
        scalars=_scalars,
        mass=spec.mass,
        head_windows=_by_head(spec),
    )


class PrefillAttention:
    """A prefill attention kernel, called like the reference without its spec.

    choices: fields of ``Tile`` that replace those of the tables.
    Raises ValueError for a spec that ``supports`` declines, and for choices that do not fit it.
    """

    def __init__(self, spec: AttentionSpec, **choices: Any) -> None:
        if reason := supports(spec):
            raise ValueError(f"no Triton prefill attention for this spec: {reason}")
        if unknown := set(choices) - {field.name for field in fields(Tile)}:
            raise ValueError(f"prefill attention has no launch choice {', '.join(sorted(unknown))}")
        widest = _widest(spec)
        for name in {"block_m", "block_n"} & choices.keys():
            size = choices[name]
            if size < 16 or size & (size - 1) or (widest is not None and size > widest):
                limit = f" up to {widest}" if widest else ""
                raise ValueError(f"{name} must be a power of two from 16 on{limit} for this spec, found {size}")
        self.spec = spec
        self.choices = choices

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        head_windows: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attention of a whole prompt over itself.

        q: ``[B, H, S, D]``; k, v: ``[B, H_kv, S, D]``; mask: ``[B | 1, H | 1, S, S]``, bool or additive, any strides;
        index: int32 ``[B, H, S / index_block, N]``; head_windows: int32 ``[H_kv]``.
        Returns ``[B, H, S, D]``, contiguous, in q's dtype (rows that see no key are zero), and behind it what the spec
        asks for: log-sum-exp, float32 ``[B, H, S]``, and mass, float32 ``[B, H_kv, S]``.
        """
        spec = self.spec
        given = (mask is not None, index is not None, head_windows is not None)
        if given != (spec.mask != "none", spec.index != "contiguous", spec.head_windows):
            raise ValueError(
                f"mask, index and head_windows must be given exactly when the spec names them: {spec.key()}"
            )
        batch, heads, tokens, d = q.shape
        family, _ = device_facts(q.device)
        tile = _fitted(replace(prefill_tile(spec, family), **self.choices), spec)
        module = load(generate(spec), "window_prefill")
        values: dict[str, Any] = {"tokens": tokens}
        for name, x in (("q", q), ("k", k), ("v", v)):
            values[name], *strides = rows_in_units(x, d)
            values |= zip((f"{name}_b", f"{name}_h", f"{name}_t"), strides, strict=True)
        constants: dict[str, Any] = {
            "BM": tile.block_m,
            "BN": tile.block_n,
            "PRECISION": PRECISION[family],
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        if mask is not None:
            values["mask"] = mask
            values |= zip(("mask_b", "mask_h", "mask_q", "mask_c"), mask_strides(mask), strict=True)
            if spec.mask == "additive" and spec.sinks and spec.window is not None:
                constants["MASK_FLOOR"] = torch.finfo(mask.dtype).min / 2
        if index is not None:
            index = index if index.stride(3) == 1 else index.contiguous()
            values |= {"index": index, "entries": index.shape[3]}
            values |= zip(("index_b", "index_h", "index_q"), index.stride()[:3], strict=True)
        values["head_windows"] = head_windows
        values["out"] = q.new_empty(batch, heads, tokens, d)
        results = [values["out"]]
        if spec.lse or spec.mass:
            values["lse"] = q.new_empty(batch, heads, tokens, dtype=torch.float32)
        if spec.lse:
            results.append(values["lse"])
        grid = (-(-tokens // tile.block_m), heads, batch)
        with torch.cuda.device_of(q):
            module.attend[grid](*(values[name] for name in parameters(spec)), **constants)
            if spec.mass:
                values["mass"] = q.new_zeros(batch, heads // spec.group, tokens, dtype=torch.float32)
                results.append(values["mass"])
                module.weigh[grid](*(values[name] for name in weigh_parameters(spec)), **constants)
        return results[0] if len(results) == 1 else tuple(results)


@lru_cache(maxsize=512)
def prefill_attention(spec: AttentionSpec, **choices: Any) -> PrefillAttention:
    """The prefill kernel of ``spec``; ``choices`` (``Tile``'s fields) override those of the tables."""
    return PrefillAttention(spec, **choices)
