"""Row blocks: every row once, in order, and no call but with a size that was agreed on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.kernels.backend import BlockSizes
from loadmaster.kernels.cpu.row_blocks import (
    SIZES_TO_TRY,
    compute_in_blocks,
    row_blocks,
)

counts_of_slots = st.lists(st.integers(0, 2000), max_size=12)
sizes_tried = st.sampled_from([*SIZES_TO_TRY, (6,), (3, 5)])


@settings(deadline=None)
@given(counts_of_slots, sizes_tried)
def test_blocks_cover_every_row_once_in_order(counts: list[int], sizes: BlockSizes) -> None:
    blocks = list(row_blocks(counts, sizes))
    covered = [(b.slot, b.start + i) for b in blocks for i in range(b.rows)]
    expected = [slot for slot, count in enumerate(counts) for _ in range(count)]
    assert covered == [(slot, row) for row, slot in enumerate(expected)]
    assert all(0 < b.rows <= b.size and b.size in sizes for b in blocks)


@settings(deadline=None)
@given(st.integers(1, 3000))
def test_padding_costs_less_than_reading_the_weights_again(rows: int) -> None:
    """No cut pads more than a block of 16 would, plus what it saves in reading."""
    blocks = list(row_blocks([rows], (16, 64, 256)))
    padding = sum(b.size for b in blocks) - rows
    in_sixteens = -(-rows // 16)
    assert padding <= 15 + 32 * (in_sixteens - len(blocks))


def test_a_decode_batch_pays_for_the_smallest_block_and_a_prefill_for_few() -> None:
    assert [b.size for b in row_blocks([1, 8, 16], (16, 64, 256))] == [16, 16, 16]
    assert [b.size for b in row_blocks([250, 512], (16, 64, 256))] == [256, 256, 256]


@pytest.mark.parametrize("width", [3, 16])
def test_a_product_sees_only_agreed_sizes_aligned_and_padded_with_zeros(width: int) -> None:
    """Three numbers a row: most blocks then begin in the middle of a cache line."""
    x = torch.randn(119, width)
    seen = []

    def compute(slot: int, block: torch.Tensor) -> torch.Tensor:
        assert block.data_ptr() % 64 == 0 and block.is_contiguous()
        seen.append(block.clone())
        return block * (slot + 1)

    out = torch.full((119, width), float("nan"))
    compute_in_blocks(x, [5, 0, 114], (16, 64), compute, out)
    assert torch.equal(out, torch.cat((x[:5], x[5:] * 3)))
    assert [len(block) for block in seen] == [16, 64, 64]
    assert torch.equal(seen[0][:5], x[:5]) and not seen[0][5:].any()
    assert not seen[2][50:].any()


def test_the_callers_rows_are_read_where_they_lie_and_never_written() -> None:
    x = torch.arange(64.0)[:, None].repeat(1, 16)
    before = x.clone()
    compute_in_blocks(x, [64], (64,), lambda slot, block: block + 1, out := torch.empty(64, 16))
    assert torch.equal(x, before) and torch.equal(out, before + 1)
