"""The methods of the sparse_attention family: one file each, listed here."""

from .streaming_llm import StreamingLLM

METHODS = (StreamingLLM,)
