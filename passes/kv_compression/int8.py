"""int8 KV cache: keys quantised per channel in blocks of 64 tokens, values per token; the newest block stays exact."""

from __future__ import annotations

from ..layerwise import LayerwiseOptions
from .quantising import QuantisingMethod


class Int8Options(LayerwiseOptions):
    """int8 has no parameters of its own: 8 bits, asymmetric, float16 scale and minimum per group."""


class Int8(QuantisingMethod):
    """Stores every cached token in 8 bits; prefill attends in full precision and quantises afterwards."""

    name = "int8"
    aliases = ("q8", "kv8")
    paper = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024), at 8 bits"
    Options = Int8Options
    kind = "int8"
