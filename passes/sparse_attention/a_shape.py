"""A-shape: the prompt sees attention sinks and a window, what comes after it sees everything."""

from __future__ import annotations

from pydantic import Field

from .streaming_llm import StreamingLLM, StreamingLLMOptions


class AShapeOptions(StreamingLLMOptions):
    """sinks, window: by default those of MInference's search."""

    sinks: int = Field(default=100, ge=0, le=4096)
    window: int = Field(default=800, ge=1)


class AShape(StreamingLLM):
    """StreamingLLM's mask over prompts alone: their time grows with their length, not its square."""

    name = "a_shape"
    aliases = ()
    phases = frozenset({"prefill"})
    paper = "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (2024)"
    Options = AShapeOptions
