"""The methods of the kv_compression family: one file each, listed here."""

from .adakv import AdaKV
from .critic import Critic
from .cskv import CSKV
from .duo_attention import DuoAttention
from .expected_attention import ExpectedAttention
from .gear import Gear
from .h2o import H2O
from .int2 import Int2
from .int4 import Int4
from .int8 import Int8
from .lazy_eviction import LazyEviction
from .look_m import LookM
from .loopserve import LoopServe
from .mpcache import MPCache
from .pyramidkv import PyramidKV
from .random import Random
from .sentence_kv import SentenceKV
from .snapkv import SnapKV
from .streaming_llm import StreamingLLMCache
from .tova import Tova
from .turboquant import TurboQuant
from .video_xl import VideoXL
from .zipcache import ZipCache

METHODS = (
    Int8,
    Int4,
    Int2,
    Gear,
    TurboQuant,
    CSKV,
    ZipCache,
    StreamingLLMCache,
    H2O,
    SnapKV,
    PyramidKV,
    AdaKV,
    DuoAttention,
    LookM,
    VideoXL,
    ExpectedAttention,
    Tova,
    LazyEviction,
    Critic,
    LoopServe,
    MPCache,
    SentenceKV,
    Random,
)
