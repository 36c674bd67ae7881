"""Attention over a cache whose tokens are stored in several formats by class, with one softmax over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import registry
from .shared_prefix import Part
from .spec import AttentionSpec, KVFormat


@dataclass(frozen=True)
class TokenClass:
    """The tokens of one class: those that matter in more bits, say, and those that do not in fewer (ZipCache).

    keys, values: buffers of the formats that ``spec_of`` was given. tokens: filled slots. positions: int32
    ``[B, 1 | H_kv, C]``, the column of each slot.
    """

    keys: Tensor
    values: Tensor
    tokens: int
    positions: Tensor


def spec_of(spec: AttentionSpec, formats: tuple[KVFormat, KVFormat] | None = None) -> AttentionSpec:
    """The spec of the kernel over one class stored in ``formats``; None: over the newest tokens, in those of ``spec``.

    Raises ``ValueError`` for lists of slots and for mass, which would be of the slots of one class.
    """
    if spec.index != "contiguous" or spec.mass:
        raise ValueError(f"classes of tokens are read whole, without lists or mass; found {spec.key()}")
    keys, values = formats or (spec.key_format, spec.value_format)
    return replace(spec, key_format=keys, value_format=values, positions=True, lse=True)


def attend(
    kernels: Sequence[Callable[..., Any]],
    classes: Sequence[TokenClass],
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_buf: Tensor,
    v_buf: Tensor,
    lens: Tensor,
    mask: Tensor | None,
    positions: Tensor,
) -> Tensor:
    """Append to the newest tokens' buffers, then attend to them and to every class. Exact: log-sum-exps are merged.

    kernels: of ``spec_of``, one per class and last that of the newest tokens. q: ``[B, H, Q, D]``. k_new, v_new,
    k_buf, v_buf, lens, mask, positions: as in ``reference.decode_attention``, of the newest tokens; columns, and so
    masks, windows and sinks, are those of the whole sequence. Returns ``[B, H, Q, D]`` in q's dtype.
    """
    *of_classes, newest = kernels
    parts: list[Part] = []
    for kernel, members in zip(of_classes, classes, strict=True):
        if members.tokens:
            sizes = torch.tensor([0, members.tokens, int(lens[2])])
            out, lse = kernel(q, None, None, members.keys, members.values, sizes, mask, members.positions)
            parts.append(Part(out, lse, 1))
    out, lse = newest(q, k_new, v_new, k_buf, v_buf, lens, mask, positions)
    parts.append(Part(out, lse, 1))
    return registry.merge(q.device.type)(parts, q)
