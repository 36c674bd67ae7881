"""Prompts whose tokens are set aside in host memory, or in files, from which a policy may choose anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from . import offload
from .eviction import Prompt


@dataclass(frozen=True)
class Aside:
    """A layer's whole prompt, and what is asked of it next.

    prompt: keys and values ``[B', H_kv, S, D]`` in host memory, without queries; it never changes, and copies of a
    cache share it. columns: int64 ``[B', 1, S]``, None where token j is column j. slots: first ones of the storage,
    which hold what is chosen; later tokens lie behind. queries: last ones ``[B, H, m, D]``. rows: int64 ``[B]``, the
    rows of the prompt that are read, None for all of them. mappings: of the files that hold keys and values, if any do.
    """

    prompt: Prompt
    columns: Tensor | None
    slots: int
    queries: Tensor
    rows: Tensor | None = None
    mappings: tuple[mmap, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values set aside."""
        return self.prompt.keys.nbytes + self.prompt.values.nbytes

    def rest(self) -> None:
        """Leave what was read to the files, if there are any."""
        for mapping in self.mappings:
            offload.release(mapping)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.prompt.keys.device

    def load(self, device: torch.device) -> tuple[Prompt, Tensor | None]:
        """The prompt with the last queries, on ``device``, and its columns."""
        rows = self.rows

        def mine(x: Tensor) -> Tensor:
            return (x if rows is None else x[rows.to(x.device)]).to(device)

        present = {name: getattr(self.prompt, name) for name in ("keys", "values", "valid", "ids", "images")}
        moved: dict[str, Any] = {name: mine(x) for name, x in present.items() if x is not None}
        columns = None if self.columns is None else mine(self.columns)
        return replace(self.prompt, queries=self.queries.to(device), **moved), columns

    def asked(self, queries: Tensor, most: int) -> Aside:
        """With the queries ``[B, H, q, D]`` of a further call, the last ``most`` of all."""
        return replace(self, queries=torch.cat([self.queries.to(queries.device), queries], 2)[:, :, -most:])

    def take(self, rows: Tensor | None, forget: int) -> Aside:
        """For these rows of the batch, None for all, without the last ``forget`` queries."""
        queries = self.queries[:, :, : max(self.queries.shape[2] - forget, 0)]
        if rows is None:
            return replace(self, queries=queries)
        mine = rows if self.rows is None else self.rows.to(rows.device)[rows]
        return replace(self, queries=queries[rows.to(queries.device)], rows=mine)


def set_aside(prompt: Prompt, columns: Tensor | None, slots: int, folder: str | None = None) -> Aside:
    """Put a prompt aside, of which ``slots`` tokens are stored; columns: see ``Aside``.

    folder: of the files for its tokens, None for memory. Raises ``OffloadError`` where they cannot be made.
    """
    mappings: list[mmap] = []
    keys, values = (_host(x) if folder is None else _filed(x, folder, mappings) for x in (prompt.keys, prompt.values))
    bare = replace(
        prompt,
        queries=prompt.queries[:, :, :0],
        keys=keys,
        values=values,
        mass=None,
        plain_queries=None,
        tables=None,
    )
    return Aside(bare, columns, slots, bare.queries, mappings=tuple(mappings))


def _filed(tokens: Tensor, folder: str, mappings: list[mmap]) -> Tensor:
    """A copy in a file, whose mapping is put to the others."""
    filed, mapping = offload.mapped(tokens.to("meta"), folder)
    filed.copy_(tokens)
    offload.release(mapping)
    mappings.append(mapping)
    return filed


def _host(tokens: Tensor) -> Tensor:
    """A copy in host memory: pinned, where it comes from a GPU, so that it goes back at the full rate."""
    if tokens.device.type == "cpu":
        return tokens.contiguous()
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    return host.copy_(tokens)
