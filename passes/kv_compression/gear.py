"""GEAR: KIVI's codes, with the error they make approximated by thin factors and its largest entries stored exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator
from torchaccel.kernels.spec import KVFormat

from .quantising import GroupedOptions, QuantisingMethod


class GearOptions(GroupedOptions):
    """bits: of a code. rank: of the factors of each block of 64 tokens. outliers: values of each group that are exact,
    half of them its largest and half its smallest; 0 is the paper's GEAR-L. group, window: as for int4."""

    bits: Literal[2, 4, 8] = 2
    rank: int = Field(default=2, ge=0, le=16)
    outliers: int = Field(default=2, ge=0, le=16)

    @field_validator("outliers")
    @classmethod
    def _pairs(cls, value: int) -> int:
        if value % 2:
            raise ValueError("outliers are an even number, half of them the largest and half the smallest")
        return value


class Gear(QuantisingMethod):
    """Stores tokens in a few bits and repairs what that costs: coherent error by low rank, single entries exactly."""

    name = "gear"
    paper = "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM (2024)"
    Options = GearOptions

    options: GearOptions

    def formats(self, dtype: str, head_dim: int) -> tuple[KVFormat, KVFormat]:
        kind: Any = f"int{self.options.bits}"
        keys, values = super().formats(dtype, head_dim)
        rank, outliers = self.options.rank, self.options.outliers
        return (
            replace(keys, kind=kind, rank=rank, outliers=outliers),
            replace(values, kind=kind, rank=rank, outliers=outliers),
        )
