"""The methods of the sparse_attention family: one file each, listed here."""

from .quest import Quest
from .streaming_llm import StreamingLLM

METHODS = (StreamingLLM, Quest)
