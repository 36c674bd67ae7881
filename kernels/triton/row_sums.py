"""Launches that sum rows of weights: how the rows are split among programs, and the total of their parts."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .tiles import device_facts, split_count

# Rows of x and of a tile of the tensor cores; rows of W that one step sums, and columns of a program.
MAX_ROWS, ROWS_SUMMED, COLUMNS = 16, 32, 64
TOTAL_COLUMNS = 256


def splits_of(rows: int, width: int, device: torch.device, lists: int = 1) -> tuple[int, int]:
    """How many programs share ``rows`` rows of W for each of its column tiles, and how many rows each takes."""
    work = -(-width // COLUMNS) * lists
    splits = max(1, split_count(rows, ROWS_SUMMED, work, device_facts(device)[1]))
    tiles = -(-rows // ROWS_SUMMED)
    return splits, -(-tiles // splits) * ROWS_SUMMED


def total(module: ModuleType, partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y ``[M, N]`` from the sums of all programs ``[splits, M, N]``."""
    splits, m, n = partial.shape
    module.total[(-(-n // TOTAL_COLUMNS), m)](partial, bias, y, splits, M=m, N=n, BC=TOTAL_COLUMNS, num_warps=2)
