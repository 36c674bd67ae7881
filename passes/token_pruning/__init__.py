"""The methods of the token_pruning family: one file each, listed here."""

from .fastv import FastV

METHODS = (FastV,)
