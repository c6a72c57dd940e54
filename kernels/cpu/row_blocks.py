"""Rows through a library's matrix products, in blocks of few fixed sizes.

A library chooses its code by the number of rows: by one, by few, by many, and by where they lie.
A row's bits then depend on its batch. So a product is only ever called with one of the sizes in
`BlockSizes`, padded with zeros, at an address that is a multiple of a cache line; which sizes give
a row equal bits on the machine at hand is settled by trial (`kernels/self_check.py`). Knows rows
and sizes. Knows nothing of experts or of who multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ..backend import BlockSizes
from .scratch import SCRATCH
from .tiles import HAS_MATRIX_UNITS

# What a library backend is tried with, the fastest first: few rows for decode, 256 to read the
# weights rarely. With one size alone there is nothing left that a row count could decide. A tile
# of matrix units has 16 rows and takes as long for one, so smaller blocks gain nothing there.
_IN_TILES: tuple[BlockSizes, ...] = ((16, 64, 256), (64, 256), (64,))
SIZES_TO_TRY = _IN_TILES if HAS_MATRIX_UNITS else ((4, 8, 16, 64, 256), *_IN_TILES)
# Reading the weights once more costs about as much as this many rows.
_READ_ROWS = 32
_LINE_BYTES = 64


class RowBlock(NamedTuple):
    """Consecutive rows of one slot, computed by one call with `size` rows."""

    slot: int
    start: int
    rows: int
    size: int


def row_blocks(counts: Sequence[int], sizes: BlockSizes) -> Iterator[RowBlock]:
    """Cut rows sorted by slot into blocks; counts: rows of each slot."""
    start = 0
    for slot, count in enumerate(counts):
        for size in _cut(count, sizes) if count else ():
            rows = min(size, count)
            yield RowBlock(slot, start, rows, size)
            start, count = start + rows, count - rows


@functools.lru_cache(maxsize=4096)
def _cut(rows: int, sizes: BlockSizes) -> tuple[int, ...]:
    """Sizes that hold so many rows at the least cost, the largest first."""
    largest = max(sizes)
    whole, rest = divmod(rows, largest)
    cost = [0.0] + [float("inf")] * rest
    taken = [0] * (rest + 1)
    for held in range(1, rest + 1):
        for size in sizes:
            price = cost[max(held - size, 0)] + size + _READ_ROWS
            if price < cost[held]:
                cost[held], taken[held] = price, size
    tail = []
    while rest:
        tail.append(taken[rest])
        rest = max(rest - taken[rest], 0)
    return (largest,) * whole + tuple(sorted(tail, reverse=True))


def compute_in_blocks(
    x_AH: Tensor,
    counts: Sequence[int],
    sizes: BlockSizes,
    compute: Callable[[int, Tensor], Tensor],
    out_AN: Tensor,
) -> None:
    """Rows sorted by slot, each through its slot, into `out_AN`.

    compute: (slot, rows [size, H]) -> [size, N], one row of it for each row given.
    """
    x_AH = x_AH.contiguous()
    for slot, start, rows, size in row_blocks(counts, sizes):
        y = compute(slot, _block(x_AH[start : start + rows], size))
        out_AN[start : start + rows] = y if rows == size else y[:rows]


def _block(x_RH: Tensor, size: int) -> Tensor:
    """`size` rows, those given first: these themselves where they fill and lie as all blocks do."""
    if len(x_RH) == size and x_RH.data_ptr() % _LINE_BYTES == 0:
        return x_RH
    block = SCRATCH.take("block", size, x_RH.shape[1], x_RH.dtype)
    block[: len(x_RH)] = x_RH
    block[len(x_RH) :] = 0
    return block
