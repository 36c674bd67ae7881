"""The methods of the kv_compression family: one file each, listed here."""

from .h2o import H2O
from .int2 import Int2
from .int4 import Int4
from .int8 import Int8
from .snapkv import SnapKV

METHODS = (Int8, Int4, Int2, SnapKV, H2O)
