"""The grouped expert MLP on the CPU with prepacked oneDNN weights.

Serves processors with matrix units, or with vectors for which panels (`cpu_panels.py`) were not
measured. Rows of one slot run in blocks, so that a block's gate, up and act stay in cache. Uses
torch's private packing operators, found by trial (`packed_available`); where they are missing,
`weights.py` takes the torch backend. Knows nothing of plans.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation import gate_rows_first, stored_rows
from ..backend import SlotShape, SlotTensors
from .gates import gated_rows
from .huge_pages import use_huge_pages
from .scratch import SCRATCH

# Rows of one pair of products: enough to read the weights rarely, few enough for the cache.
BLOCK_ROWS = 384
# Blocks of at most SMALL_ROWS share their gather, gate and copies, up to STRIP_ROWS together.
SMALL_ROWS = 32
STRIP_ROWS = 256
# A single row takes another code path with other bits (measured on torch 2.13: both dtypes once
# H or I reaches 2048); from two rows on, a row's bits do not depend on how many there are.
# Three rows take no longer than one or two.
LEAST_ROWS = 3
# Each new row count compiles a oneDNN kernel (0.5 ms or more); above this, counts are rounded up.
EXACT_ROWS = 16
ROW_STEP = 2
# The packed layout serves any row count; the hint only has to be far from a single row.
_LAYOUT_HINT_ROWS = 64


def pack(weight: Tensor) -> Tensor:
    """A matrix [N, K] in oneDNN's own layout, in huge pages where the system has them."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.contiguous(), _LAYOUT_HINT_ROWS
    )
    size_bytes = weight.numel() * weight.element_size()
    if hasattr(torch.ops.mkldnn, "data_ptr"):
        use_huge_pages(torch.ops.mkldnn.data_ptr(packed), size_bytes)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, K] times a packed [N, K], transposed, plus bias: a new [rows, N]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return y


@functools.cache
def packed_available(dtype: torch.dtype) -> bool:
    """Whether this torch build packs `dtype`, multiplies right with it and gives it back."""
    if dtype not in (torch.bfloat16, torch.float32) or not torch._C._has_mkldnn:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator).to(dtype)
    x = torch.randn(6, 40, generator=generator).to(dtype)
    try:
        packed = pack(weight)
        y = packed_linear(x, packed, None)
        returned = packed.to_dense()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    close = torch.allclose(y.double(), x.double() @ weight.double().T, rtol=2e-2, atol=2e-2)
    return close and torch.equal(returned, weight)


class RowBlock(NamedTuple):
    """Consecutive rows of one slot, computed by one pair of products."""

    slot: int
    start: int
    rows: int
    computed: int  # rows and padding: a number that repeats between calls, so kernels are reused


def row_strips(counts: Sequence[int]) -> Iterator[list[RowBlock]]:
    """Cut rows sorted by slot into strips of blocks.

    A large slot is cut into near-equal blocks of at most BLOCK_ROWS rows. A strip is one block,
    or consecutive small ones: what those do beside their products is then done once per strip.
    """
    strip: list[RowBlock] = []
    held = start = 0
    for slot, count in enumerate(counts):
        stop = start + count
        size = -(-count // max(-(-count // BLOCK_ROWS), 1))
        if size > EXACT_ROWS:
            size = -(-size // ROW_STEP) * ROW_STEP
        while start < stop:
            rows = min(size, stop - start)
            if strip and (rows > SMALL_ROWS or held + rows > STRIP_ROWS):
                yield strip
                strip, held = [], 0
            step = ROW_STEP if rows > EXACT_ROWS else 1
            computed = max(-(-rows // step) * step, LEAST_ROWS)
            strip.append(RowBlock(slot, start, rows, computed))
            held += rows if rows <= SMALL_ROWS else STRIP_ROWS
            start += rows
    if strip:
        yield strip


def strip_span(strip: Sequence[RowBlock]) -> tuple[int, int, int]:
    """First row, end of the rows, and end of rows and padding of one strip."""
    last = strip[-1].start + strip[-1].rows
    return strip[0].start, last, max(block.start + block.computed for block in strip)


class PackedExpert(NamedTuple):
    """One expert's matrices in oneDNN's layout, gate rows first."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class PackedSlots:
    """Packed weights per slot; the unpacked tensors are not kept."""

    name = "packed"

    def __init__(self, shape: SlotShape) -> None:
        self.shape = shape
        empty = {
            name: torch.zeros(size, dtype=shape.dtype)
            for name, size in shape.tensor_shapes().items()
        }
        self._experts: list[PackedExpert] = [self._packed(empty)] * shape.slots

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        self._experts[slot] = self._packed(tensors)

    def get_slot(self, slot: int) -> SlotTensors:
        expert, activation = self._experts[slot], self.shape.activation
        tensors = {
            "gate_up": stored_rows(expert.gate_up.to_dense(), activation),
            "down": expert.down.to_dense(),
        }
        if expert.gate_up_bias is not None and expert.down_bias is not None:
            tensors["gate_up_bias"] = stored_rows(expert.gate_up_bias, activation).clone()
            tensors["down_bias"] = expert.down_bias.clone()
        return tensors

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        x_AH = x_AH.contiguous()
        for strip in row_strips(count_S.tolist()):
            first, _, reach = strip_span(strip)
            x = x_AH[first:reach]
            if reach > len(x_AH):
                x = SCRATCH.take("x", reach - first, self.shape.hidden, self.shape.dtype)
                x[: len(x_AH) - first] = x_AH[first:]
            self._run_strip(strip, x, out_AH)

    def _run_strip(self, strip: list[RowBlock], x: Tensor, out_AH: Tensor) -> None:
        """Products of one strip; x starts at the strip's first row and covers its padding.

        The padding rows of a block are the next block's rows: their results are dropped.
        """
        shape, (first, last, reach) = self.shape, strip_span(strip)
        act = SCRATCH.take("act", reach - first, shape.intermediate, shape.dtype)
        if len(strip) == 1:
            expert, rows = self._experts[strip[0].slot], strip[0].rows
            gate_up = packed_linear(x, expert.gate_up, expert.gate_up_bias)
            gated_rows(gate_up, shape.activation, act)
            y = packed_linear(act, expert.down, expert.down_bias)
            out_AH[first:last] = y if rows == len(y) else y[:rows]
            return
        gate_ups, ys = [], []
        for slot, start, rows, computed in strip:
            expert, row = self._experts[slot], start - first
            y = packed_linear(x[row : row + computed], expert.gate_up, expert.gate_up_bias)
            gate_ups.append(y if rows == computed else y[:rows])
        gated_rows(torch.cat(gate_ups), shape.activation, act[: last - first])
        for slot, start, rows, computed in strip:
            expert, row = self._experts[slot], start - first
            y = packed_linear(act[row : row + computed], expert.down, expert.down_bias)
            ys.append(y if rows == computed else y[:rows])
        torch.cat(ys, out=out_AH[first:last])

    def _packed(self, tensors: SlotTensors) -> PackedExpert:
        activation = self.shape.activation
        gate_up, down = gate_rows_first(tensors["gate_up"], activation), tensors["down"]
        if not self.shape.bias:
            return PackedExpert(pack(gate_up), pack(down), None, None)
        # Own copies: a caller may reuse its tensors.
        gate_up_bias = gate_rows_first(tensors["gate_up_bias"], activation).clone()
        return PackedExpert(pack(gate_up), pack(down), gate_up_bias, tensors["down_bias"].clone())
