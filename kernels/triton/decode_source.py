"""Source of the decode attention kernels: what a spec asks of the templates, and the parameters they take."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import gcd

from .. import low_rank
from ..codebook import gaussian
from ..spec import DTYPES, AttentionSpec, KVFormat
from .codebook_polynomial import table_polynomial
from .source import padded, power_of_two, render
from .units import stride_unit

_TENSORS = {
    "q",
    "k_buf",
    "v_buf",
    "out",
    "part",
    "lse",
    "mass",
    "k_new",
    "v_new",
    "mask",
    "positions",
    "index",
    "head_windows",
    "cos",
    "sin",
    "projection",
    "angles",
}
# Latents of all heads that are multiplied at a time when keys are rebuilt.
LATENT_STEP = 32


def blocked_format(spec: AttentionSpec) -> KVFormat | None:
    """The format that says which slots lie in blocks, that of the keys or of the values; None when both are dense."""
    return next((fmt for fmt in (spec.key_format, spec.value_format) if fmt.is_blocked), None)


def widest_tile(spec: AttentionSpec) -> int | None:
    """Slots of the widest tile, a power of two, that has one block, one group and one list entry; None when any has."""
    sizes = []
    for fmt in (spec.key_format, spec.value_format):
        if fmt.is_blocked:
            grouped = fmt.is_quantised and fmt.axis == "channel" and spec.index != "tokens"
            sizes.append(fmt.group_size if grouped else fmt.block)
    if spec.index == "blocks":
        sizes.append(spec.index_block)
    size = gcd(*sizes)
    return size & -size if sizes else None


def skips_window(spec: AttentionSpec) -> bool:
    """Whether tiles outside the window and the sinks are never visited."""
    return spec.window is not None and not spec.positions and spec.index == "contiguous"


def parameters(spec: AttentionSpec, append: bool, stream: bool = False) -> list[str]:
    """Run-time parameters of the generated ``attend``, in order."""
    names = ["q", "k_buf", "v_buf", "out", "part"]
    names += ["lse"] if spec.lse or spec.mass else []
    names += ["heads", "units", "unit_tiles", "each"] if stream else []
    names += ["start", "end", "logical", "q_b", "q_h", "q_t", "k_b", "k_h", "v_b", "v_h"]
    if append:
        names += ["k_new", "v_new", "kn_b", "kn_h", "kn_t", "vn_b", "vn_h", "vn_t"]
    return names + _selection(spec, append) + _tables(spec) + _rebuilding(spec)


def weigh_parameters(spec: AttentionSpec) -> list[str]:
    """Run-time parameters of the generated ``weigh``, in order."""
    names = ["q", "k_buf", "lse", "mass", "capacity", "start", "end", "logical", "q_b", "q_h", "q_t", "k_b", "k_h"]
    return names + _selection(spec, append=False) + _tables(spec) + _rebuilding(spec)


def _tables(spec: AttentionSpec) -> list[str]:
    """The parameters with which queries and new keys are rotated."""
    return [] if spec.rotary == "none" else ["cos", "sin", "table_b", "table_t"]


def _rebuilding(spec: AttentionSpec) -> list[str]:
    """The parameters with which latents become keys."""
    return ["projection", "angles", "angles_s", "angles_b"] if spec.key_format.kind == "latent" else []


def _selection(spec: AttentionSpec, append: bool) -> list[str]:
    """The parameters that say which keys a query sees."""
    names = []
    if spec.mask != "none":
        names += ["mask", "mask_b", "mask_h", "mask_q", "mask_c"]
        if spec.sinks and spec.window is not None:
            names += ["mask_columns"]
    if spec.positions:
        names += ["positions", "positions_b", "positions_h"]
    if spec.index != "contiguous":
        names += ["index", "index_b", "index_h", "entries"] + ([] if append else ["since"])
    if spec.head_windows and spec.window is not None:
        names += ["head_windows"]
    return names


def completion_parameters(spec: AttentionSpec) -> list[str]:
    """Run-time parameters of the generated ``complete_block``, in order."""
    names = ["k_buf", "v_buf", "end", "logical", "k_b", "k_h", "v_b", "v_h"]
    names += ["k_new", "v_new", "kn_b", "kn_h", "kn_t", "vn_b", "vn_h", "vn_t"]
    return names + (["positions", "positions_b", "positions_h"] if spec.positions else [])


def offset_in_block(fmt: KVFormat, name: str) -> int:
    """Bytes of a block before the part ``name``."""
    names = [part.name for part in fmt.parts]
    return sum(part.nbytes for part in fmt.parts[: names.index(name)])


def _scalars(names: list[str]) -> str:
    # mask_c is nearly always 1 and never changes with the length: it may be specialised.
    return ", ".join(f'"{name}"' for name in names if name not in _TENSORS and name != "mask_c")


@lru_cache(maxsize=512)
def generate(spec: AttentionSpec, append: bool = True, stream: bool = False) -> str:
    """Triton source of ``spec``: ``attend``, ``merge``, ``complete_block`` for formats with blocks, ``weigh`` for mass.

    ``append`` False generates the variant for buffers that already hold the new tokens (static caches, and caches whose
    tail has just become a block): it writes nothing to them and skips tiles that a bool mask hides wholly; ``weigh`` is
    part of it. ``stream`` makes every program take equally many tiles of all (batch row, KV head) units in turn.
    """
    blocked = blocked_format(spec)
    return render(
        "decode_attention.py.jinja",
        spec,
        append=append,
        stream=stream,
        scalars=_scalars,
        parameters=parameters(spec, append, stream),
        weigh_parameters=weigh_parameters(spec),
        completion_parameters=completion_parameters(spec),
        positions=spec.positions,
        head_windows=spec.head_windows and spec.window is not None,
        keys=spec.key_format,
        values=spec.value_format,
        block=blocked.block if blocked else None,
        window_of_tail=blocked.window if blocked else None,
        k_unit=stride_unit(spec.key_format),
        v_unit=stride_unit(spec.value_format),
        ranges=skips_window(spec),
        skips_masked=spec.mask == "bool" and not append,
        weighs=spec.mass and not append,
        padded=padded,
        power_of_two=power_of_two,
        offset_in_block=offset_in_block,
        table_polynomial=table_polynomial,
        gaussian=gaussian,
        pairwise=pairwise,
        low_rank=low_rank,
        latent_step=LATENT_STEP,
        dtype_bytes=DTYPES[spec.dtype].itemsize,
    )
