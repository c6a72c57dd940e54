"""Which tiles of rows the products walk: every slot's rows cut into blocks, slot after slot.

Made on the CPU, where the counts are; knows no weights and no block sizes but the rows of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class TileMap(NamedTuple):
    """The tiles that cover every slot's rows; int32 on the device.

    row_end_S: end of each slot's rows. tile_slot, tile_row: slot and first row of each tile.
    tile_count: [1] how many tiles there are, and tiles the same number on the CPU.
    """

    row_end_S: Tensor
    tile_slot: Tensor
    tile_row: Tensor
    tile_count: Tensor
    tiles: int


def map_tiles(counts: Sequence[int], block_rows: int, device: torch.device) -> TileMap:
    """Tiles of at most block_rows rows for slots with these counts; no tile spans two slots."""
    count_S = np.array(counts, np.int64)
    end_S = np.cumsum(count_S)
    tiles_S = -(-count_S // block_rows)
    slot = np.repeat(np.arange(len(count_S)), tiles_S)
    before = np.repeat(np.cumsum(tiles_S) - tiles_S, tiles_S)
    row = (end_S - count_S)[slot] + (np.arange(len(slot)) - before) * block_rows
    parts = [end_S, slot, row, np.array([len(slot)])]
    # One transfer for all of them.
    numbers = torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device)
    end, slots, rows, tile_count = torch.split(numbers, [len(part) for part in parts])
    return TileMap(end, slots, rows, tile_count, len(slot))
