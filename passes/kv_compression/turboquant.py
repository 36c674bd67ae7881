"""TurboQuant: rotated tokens look alike whatever the data, so one codebook and one norm per token are enough."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torchaccel.kernels.spec import KVFormat

from ..layerwise import LayerwiseOptions
from .quantising import BLOCK, QuantisingMethod


class TurboQuantOptions(LayerwiseOptions):
    """key_bits, value_bits: of a code. window: most recent tokens that stay in full precision at least."""

    key_bits: Literal[2, 4] = 4
    value_bits: Literal[2, 4] = 4
    window: int = Field(default=0, ge=0, le=4096)


class TurboQuant(QuantisingMethod):
    """Turns keys and values by a fixed random rotation and stores places in a fixed codebook, and their norms.

    The mean-square variant, with norms corrected; the paper's unbiased one, with a bit of the residual's sign, is not
    offered: at the same number of bits it is noisier.
    """

    name = "turboquant"
    aliases = ("turbo",)
    paper = "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate (2025)"
    Options = TurboQuantOptions

    options: TurboQuantOptions

    def formats(self, dtype: str, head_dim: int) -> tuple[KVFormat, KVFormat]:
        window = self.options.window
        keys: Any = f"int{self.options.key_bits}"
        values: Any = f"int{self.options.value_bits}"
        return (
            KVFormat(keys, dtype, head_dim, "token", BLOCK, 0, window, "channel", codebook="gaussian"),
            KVFormat(values, dtype, head_dim, "token", BLOCK, 0, window, "token", codebook="gaussian"),
        )
