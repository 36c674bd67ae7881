"""The methods of the sparse_attention family: one file each, listed here."""

from .a_shape import AShape
from .biformer import BiFormer
from .double_sparsity import DoubleSparsity
from .duo_attention import DuoAttentionReading
from .flex_prefill import FlexPrefill
from .infllm_v2 import InfLLMv2
from .longgen import LongGen
from .loopserve import LoopServePrompt
from .lserve import LServe
from .minference import MInference
from .quest import Quest
from .recycled_attention import RecycledAttention
from .sliding_window import SlidingWindow
from .streaming_llm import StreamingLLM
from .tidal_decode import TidalDecode
from .video_xl import VideoXLPrompt
from .xattention import XAttention

METHODS = (
    StreamingLLM,
    SlidingWindow,
    AShape,
    LongGen,
    DuoAttentionReading,
    XAttention,
    FlexPrefill,
    MInference,
    LoopServePrompt,
    VideoXLPrompt,
    InfLLMv2,
    BiFormer,
    Quest,
    DoubleSparsity,
    TidalDecode,
    RecycledAttention,
    LServe,
)
