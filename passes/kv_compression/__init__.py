"""The methods of the kv_compression family: one file each, listed here."""

from .critic import Critic
from .expected_attention import ExpectedAttention
from .gear import Gear
from .h2o import H2O
from .int2 import Int2
from .int4 import Int4
from .int8 import Int8
from .lazy_eviction import LazyEviction
from .loopserve import LoopServe
from .mpcache import MPCache
from .pyramidkv import PyramidKV
from .sentence_kv import SentenceKV
from .snapkv import SnapKV
from .streaming_llm import StreamingLLMCache
from .tova import Tova
from .turboquant import TurboQuant

METHODS = (
    Int8,
    Int4,
    Int2,
    Gear,
    TurboQuant,
    StreamingLLMCache,
    H2O,
    SnapKV,
    PyramidKV,
    ExpectedAttention,
    Tova,
    LazyEviction,
    Critic,
    LoopServe,
    MPCache,
    SentenceKV,
)
