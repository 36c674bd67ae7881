"""transformers with FlexAttention, compiled by Inductor."""

from __future__ import annotations

from typing import Any

from .inductor import Inductor


class Flex(Inductor):
    """``attn_implementation="flex_attention"``: masks become block masks, attention a generated template."""

    def build(self, model: Any, case: str) -> Any:
        """Compile a copy whose attention is switched."""
        copy = super().build(model, case)
        copy.set_attn_implementation("flex_attention")
        return copy
