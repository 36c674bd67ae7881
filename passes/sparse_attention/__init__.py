"""The methods of the sparse_attention family: one file each, listed here."""

from .flex_prefill import FlexPrefill
from .loopserve import LoopServePrompt
from .lserve import LServe
from .minference import MInference
from .quest import Quest
from .streaming_llm import StreamingLLM
from .tidal_decode import TidalDecode
from .xattention import XAttention

METHODS = (StreamingLLM, XAttention, FlexPrefill, MInference, LoopServePrompt, Quest, TidalDecode, LServe)
