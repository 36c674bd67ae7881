"""The methods of the layer_skipping family: one file each, listed here."""

from .unified import Unified

METHODS = (Unified,)
