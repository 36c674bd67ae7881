"""The methods of the sparse_attention family: one file each, listed here."""

from .double_sparsity import DoubleSparsity
from .flex_prefill import FlexPrefill
from .loopserve import LoopServePrompt
from .minference import MInference
from .quest import Quest
from .recycled_attention import RecycledAttention
from .streaming_llm import StreamingLLM
from .xattention import XAttention

METHODS = (StreamingLLM, XAttention, FlexPrefill, MInference, LoopServePrompt, Quest, DoubleSparsity, RecycledAttention)
