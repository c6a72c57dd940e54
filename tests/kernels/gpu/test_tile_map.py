"""Every row lies in one tile, and no tile spans two slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from loadmaster.kernels.gpu.tile_map import map_tiles

CPU = torch.device("cpu")


def test_two_slots_of_twenty_and_three_rows() -> None:
    tiles = map_tiles([20, 0, 3], 16, CPU)
    assert tiles.row_end_S.tolist() == [20, 20, 23]
    assert tiles.tile_slot.tolist() == [0, 0, 2]
    assert tiles.tile_row.tolist() == [0, 16, 20]
    assert tiles.tile_count.tolist() == [tiles.tiles] == [3]
    assert {part.dtype for part in tiles[:4]} == {torch.int32}


@settings(deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=20), st.sampled_from([16, 64]))
def test_tiles_cover_every_row_once(counts: list[int], block_rows: int) -> None:
    tiles = map_tiles(counts, block_rows, CPU)
    slot_of_row = [slot for slot, count in enumerate(counts) for _ in range(count)]
    covered: list[int] = []
    for slot, row in zip(tiles.tile_slot.tolist(), tiles.tile_row.tolist(), strict=True):
        end = min(row + block_rows, int(tiles.row_end_S[slot]))
        assert row < end and set(slot_of_row[row:end]) == {slot}
        covered.extend(range(row, end))
    assert covered == list(range(sum(counts)))
