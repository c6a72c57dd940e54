"""Whether a row's bits depend on that row alone: tried on the machine at hand, before it serves.

Placement changes which rows meet in a batch, so a product whose rows depend on their number or
place would change outputs. No reading of a library's code can rule that out on every processor;
a trial with the very widths can. Rows run alone, in pairs, in small batches, in batches that fill
each block their backend uses, so that a row is at every place of it, and in a large one. Knows
rows and what computes them. Knows nothing of plans, ranks or models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .backend import BlockSizes, SlotBackend, SlotShape, SlotTensors

Rows = Callable[[Tensor], Tensor]        # [rows, H] -> [rows, N]

DISTINCT_ROWS = 3
SMALL_BATCHES = (2, 3, 5, 7)
# The large batch: the largest block and so many more.
MORE_ROWS = 41
# Numbers that stand for weights, over and over: a prime, so that no row repeats another.
_NUMBERS = 65_537

_FAULTS: dict[tuple[object, ...], str] = {}
_CHECKING = threading.Lock()


def rows_fault(compute: Rows, width: int, dtype: torch.dtype, sizes: BlockSizes) -> str:
    """How a row's bits depend on its batch, in one line; "" where they do not.

    compute: rows of `width` to as many rows. sizes: the blocks it cuts them into.
    """
    distinct = drawn((DISTINCT_ROWS, width), dtype, seed=1)
    alone = torch.cat([compute(distinct[i : i + 1].clone()) for i in range(DISTINCT_ROWS)])
    for rows in (*SMALL_BATCHES, *sizes, max(sizes) + MORE_ROWS):
        place = torch.arange(rows) % DISTINCT_ROWS
        y, want = compute(distinct[place]), alone[place]
        if not _same_bits(y, want):
            row = next(i for i in range(rows) if not _same_bits(y[i], want[i]))
            return f"row {row} of {rows} has other bits than alone"
    return ""


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Not merely equal: a zero has a sign, and a NaN equals nothing."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def backend_fault(
    make: Callable[[SlotShape, BlockSizes], SlotBackend], shape: SlotShape, sizes: BlockSizes
) -> str:
    """`rows_fault` of experts of this shape on one backend; each kind is tried once a process."""
    shape = replace(shape, slots=1)
    key = (make, shape, sizes, torch.get_num_threads())
    with _CHECKING:
        if key not in _FAULTS:
            _FAULTS[key] = _backend_fault(make(shape, sizes), sizes)
        return _FAULTS[key]


def _backend_fault(backend: SlotBackend, sizes: BlockSizes) -> str:
    shape = backend.shape
    backend.set_slot(0, _drawn_expert(shape))

    def compute(x_AH: Tensor) -> Tensor:
        out_AH = torch.empty_like(x_AH)
        backend.run(x_AH, torch.tensor([len(x_AH)]), out_AH)
        return out_AH

    return rows_fault(compute, shape.hidden, shape.dtype, sizes)


def _drawn_expert(shape: SlotShape) -> SlotTensors:
    """An expert whose outputs are of order one."""
    return {
        name: drawn(size, shape.dtype, seed=2, scale=size[-1] ** -0.5)
        for name, size in shape.tensor_shapes().items()
    }


def drawn(
    size: tuple[int, ...], dtype: torch.dtype, *, seed: int, scale: float = 1.0
) -> Tensor:
    """Normal numbers; quick for large sizes, which repeat some of them."""
    total = torch.Size(size).numel()
    few = torch.randn(min(total, _NUMBERS), generator=torch.Generator().manual_seed(seed))
    return (few * scale).to(dtype).repeat(-(-total // max(len(few), 1)))[:total].view(size)
