"""The methods of the sparse_attention family: one file each, listed here."""

from .flex_prefill import FlexPrefill
from .infllm_v2 import InfLLMv2
from .loopserve import LoopServePrompt
from .minference import MInference
from .quest import Quest
from .streaming_llm import StreamingLLM
from .xattention import XAttention

METHODS = (StreamingLLM, XAttention, FlexPrefill, MInference, LoopServePrompt, Quest, InfLLMv2)
