"""The methods of the kv_compression family: one file each, listed here."""

from .int8 import Int8

METHODS = (Int8,)
