"""Ragged caches for kernels: heads with random numbers of tokens; the truth is attention head by head in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torchaccel.kernels.ragged import PAGE
from torchaccel.kernels.spec import DTYPES, AttentionSpec, KVFormat


@dataclass(frozen=True)
class RaggedCase:
    """One call: rows of up to ``tokens`` tokens out of ``logical`` columns, and ``new`` ones behind ``appended``."""

    name: str
    dtype: str = "float32"
    head_dim: int = 42
    group: int = 3
    kv_heads: int = 3
    batch: int = 2
    tokens: int = 123
    logical: int = 300
    appended: int = 0
    new: int = 1
    mask: Literal["none", "bool", "additive"] = "none"
    window: int | None = None
    sinks: int = 0
    head_windows: bool = False

    @property
    def spec(self) -> AttentionSpec:
        """The kernel's spec."""
        fmt = KVFormat("dense", self.dtype, self.head_dim)
        return AttentionSpec(
            "decode",
            self.head_dim,
            self.group,
            self.dtype,
            fmt,
            fmt,
            0.3,
            mask=self.mask,
            window=self.window,
            sinks=self.sinks,
            positions=True,
            head_windows=self.head_windows,
            index="blocks",
            index_block=PAGE,
        )

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Arguments of ``ragged.attend`` but the kernel; segments lie in any order, slots to come are zero."""
        generator = torch.Generator().manual_seed(len(self.name))
        dtype, units, d = DTYPES[self.dtype], self.batch * self.kv_heads, self.head_dim
        room = self.appended + self.new + 5
        base = self.logical - self.appended
        counts = torch.randint(0, min(self.tokens, base) + 1, (units,), generator=generator)
        counts[0] = min(self.tokens, base)
        pages = (counts + room + PAGE - 1) // PAGE
        total = int(pages.sum()) + 2
        order = torch.randperm(units, generator=generator)
        starts = torch.empty_like(counts)
        starts[order] = (pages[order].cumsum(0) - pages[order] + 1) * PAGE
        k_pool, v_pool = (torch.zeros(1, 1, total * PAGE, d, dtype=dtype) for _ in range(2))
        # Pages of nobody.
        for pool in (k_pool, v_pool):
            pool[..., :PAGE, :] = pool[..., -PAGE:, :] = torch.nan
        positions = torch.zeros(1, 1, total * PAGE, dtype=torch.int32)
        table = torch.full((units, int(pages.max()) + 1), -1, dtype=torch.int32)
        for unit in range(units):
            first, count = int(starts[unit]), int(counts[unit])
            stored = count + self.appended
            for pool in (k_pool, v_pool):
                pool[0, 0, first : first + stored] = torch.randn(stored, d, generator=generator).to(dtype)
            positions[0, 0, first : first + count] = torch.randperm(base, generator=generator)[:count].sort().values
            rest = int(pages[unit]) * PAGE - count
            positions[0, 0, first + count : first + count + rest] = torch.arange(base, base + rest)
            table[unit, : pages[unit]] = torch.arange(first // PAGE, first // PAGE + int(pages[unit]))

        def fresh(heads: int) -> Tensor:
            return torch.randn(self.batch, self.new, heads, d, generator=generator).to(dtype).transpose(1, 2)

        shape = self.batch, self.kv_heads
        return {
            "q": 2 * fresh(self.kv_heads * self.group),
            "k_new": fresh(self.kv_heads),
            "v_new": fresh(self.kv_heads),
            "k_pool": k_pool,
            "v_pool": v_pool,
            "lens": torch.tensor([0, total * PAGE, self.logical, self.appended]),
            "mask": self._mask(generator),
            "positions": positions,
            "table": table.view(*shape, -1),
            "tails": (starts + counts).view(shape),
            "head_windows": (torch.arange(self.kv_heads) % 2).int() if self.head_windows else None,
        }

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        """Left padding, of another length in every row, and single columns."""
        if self.mask == "none":
            return None
        columns = self.logical + self.new
        allowed = torch.rand(self.batch, 1, self.new, columns, generator=generator) > 0.2
        for row in range(self.batch):
            allowed[row, ..., : 40 * row] = False
            allowed[row, ..., 40 * row] = True
        last = torch.arange(self.logical, columns)
        allowed[..., last - self.logical, last] = True
        return allowed if self.mask == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)

    def expected(self) -> Tensor:
        """``[B, H, Q, D]`` in float32: every row and head by itself."""
        given = self.inputs
        out = torch.zeros(given["q"].shape)
        for row in range(self.batch):
            allowed = None if given["mask"] is None else given["mask"][row, 0]
            if allowed is not None and allowed.dtype != torch.bool:
                allowed = allowed == 0
            begin = 0 if allowed is None else int(allowed[-1].int().argmax())
            for head in range(self.kv_heads):
                pages = [int(page) for page in given["table"][row, head] if page >= 0]
                slots = torch.arange(pages[0] * PAGE, int(given["tails"][row, head]) + self.appended)
                columns = torch.cat([given["positions"][0, 0, slots], torch.arange(self.new) + self.logical]).long()
                keys, values = (
                    torch.cat([given[pool][0, 0, slots], given[new][row, head]]).float()
                    for pool, new in (("k_pool", "k_new"), ("v_pool", "v_new"))
                )
                bound = self.window is not None and (not self.head_windows or head % 2 == 1)
                for query in range(self.new):
                    seen = columns <= self.logical + query
                    if bound:
                        near = columns > self.logical + query - self.window
                        seen = seen & (near | (columns < begin + self.sinks))
                    if allowed is not None:
                        seen = seen & allowed[query, columns]
                    for h in range(head * self.group, (head + 1) * self.group):
                        scores = keys @ given["q"][row, h, query].float() * 0.3
                        out[row, h, query] = torch.softmax(scores.masked_fill(~seen, -torch.inf), 0) @ values
        return out


RAGGED_CASES = [
    RaggedCase("ragged_one_token"),
    RaggedCase("ragged_bool_mask", mask="bool", appended=40, new=3, dtype="bfloat16", head_dim=64),
    RaggedCase("ragged_windows", mask="bool", appended=7, window=50, sinks=3, head_windows=True, new=2),
    RaggedCase("ragged_additive", mask="additive", appended=29, new=6, kv_heads=2, group=1),
    RaggedCase("ragged_in_parts", new=20, tokens=6, batch=1, window=9, head_windows=True),
]
