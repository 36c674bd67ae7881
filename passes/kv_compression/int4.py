"""int4 KV cache: KIVI at 4 bits, with a window of recent tokens in full precision."""

from __future__ import annotations

from .quantising import GroupedOptions, QuantisingMethod


class Int4Options(GroupedOptions):
    """Groups and window of KIVI at 4 bits."""


class Int4(QuantisingMethod):
    """Stores every cached token but the most recent ones in 4 bits."""

    name = "int4"
    aliases = ("q4", "kv4")
    paper = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024), at 4 bits"
    Options = Int4Options
    kind = "int4"
