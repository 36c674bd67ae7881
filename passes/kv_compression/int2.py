"""int2 KV cache: KIVI at 2 bits, with a window of recent tokens in full precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .quantising import GroupedOptions, QuantisingMethod


class Int2Options(GroupedOptions):
    """Groups and window of KIVI at 2 bits: smaller groups and a longer window than at 4."""

    group: Literal[32, 64, 128] = 32
    window: int = Field(default=128, ge=0, le=4096)


class Int2(QuantisingMethod):
    """Stores every cached token but the most recent ones in 2 bits."""

    name = "int2"
    aliases = ("kivi", "q2", "kv2")
    paper = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024)"
    Options = Int2Options
    kind = "int2"
