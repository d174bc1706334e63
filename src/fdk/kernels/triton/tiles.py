"""Tiles of rows that each use one table."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fdk.packing.layouts import Geometry


@lru_cache(maxsize=1024)
def row_tiles(geometry: Geometry, rows: int, device: torch.device) -> Tensor:
    """[tiles, 3] int32: first row, end and table of tiles of at most `rows` rows that each use one table."""
    tiles = [
        (start, min(start + rows, end), table)
        for table, (first, end) in enumerate(geometry.ranges)
        for start in range(first, end, rows)
    ]
    return torch.tensor(tiles, dtype=torch.int32).to(device)
