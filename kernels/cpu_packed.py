"""The grouped expert MLP on the CPU with prepacked oneDNN weights.

Rows of one slot run in blocks of at most 256, so that a block's gate, up and act stay in cache.
Uses torch's private packing operators, found by trial (`packed_available`); where they are
missing, `grouped.py` takes the torch backend. Knows nothing of plans. One thread; buffers are
reused, so one call at a time per thread.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .activation import gate_rows_first, gated_inplace, stored_rows
from .backend import SlotShape, SlotTensors
from .cpu_float import as_array
from .cpu_loops import (
    GATE_GELU_TANH,
    GATE_GPTOSS,
    GATE_RELU,
    GATE_SILU,
    combine_rows,
    gated_rows,
    sort_slots,
)

BLOCK_ROWS = 256
# A single row takes another code path with other bits (measured on torch 2.13: both dtypes once
# H or I reaches 2048); from two rows on, a row's bits do not depend on how many there are.
LEAST_ROWS = 2
# Each new row count compiles a oneDNN kernel (0.5 ms or more); above this, counts are rounded up.
EXACT_ROWS = 16
ROW_STEP = 4
# The packed layout serves any row count; the hint only has to be far from a single row.
_LAYOUT_HINT_ROWS = 64

_GATE_CODES = {
    "silu": GATE_SILU,
    "relu": GATE_RELU,
    "gelu_tanh": GATE_GELU_TANH,
    "gptoss_clamped": GATE_GPTOSS,
}


def pack(weight: Tensor) -> Tensor:
    """A matrix [N, K] in oneDNN's own layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LAYOUT_HINT_ROWS)
    return cast(Tensor, packed)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, K] times a packed [N, K], transposed, plus bias: a new [rows, N]."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


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


def row_blocks(count: int) -> Iterator[tuple[int, int, int]]:
    """Cut `count` rows into near-equal blocks: (first row, rows, rows to compute).

    The third number repeats between calls far more often than the second, so kernels are reused.
    """
    blocks = -(-count // BLOCK_ROWS)
    size = -(-count // max(blocks, 1))
    if size > EXACT_ROWS:
        size = -(-size // ROW_STEP) * ROW_STEP
    for start in range(0, count, max(size, 1)):
        rows = min(size, count - start)
        padded = rows if rows <= EXACT_ROWS else -(-rows // ROW_STEP) * ROW_STEP
        yield start, rows, max(padded, LEAST_ROWS)


class _Buffers(threading.local):
    """Scratch that every layer of a thread shares; grows to the largest seen."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] of scratch; holds whatever was last written there."""
        held = self._held.get((name, dtype))
        if held is None or held.numel() < rows * columns:
            held = torch.zeros(rows * columns, dtype=dtype)
            self._held[name, dtype] = held
        return held[: rows * columns].view(rows, columns)


_BUFFERS = _Buffers()


class PackedSlots:
    """Packed weights per slot; the unpacked tensors are not kept."""

    name = "packed"

    def __init__(self, shape: SlotShape) -> None:
        self.shape = shape
        empty = {
            name: torch.zeros(size, dtype=shape.dtype)
            for name, size in shape.tensor_shapes().items()
        }
        self._experts: list[SlotTensors] = [self._packed(empty)] * shape.slots
        self._gate_code = _GATE_CODES.get(shape.activation.kind)
        self._limit = np.float32(shape.activation.limit or 0.0)
        self._alpha = np.float32(shape.activation.alpha or 0.0)

    def set_slot(self, slot: int, tensors: SlotTensors) -> None:
        self._experts[slot] = self._packed(tensors)

    def get_slot(self, slot: int) -> SlotTensors:
        expert, activation = self._experts[slot], self.shape.activation
        tensors = {
            "gate_up": stored_rows(expert["gate_up"].to_dense(), activation),
            "down": expert["down"].to_dense(),
        }
        if self.shape.bias:
            tensors["gate_up_bias"] = stored_rows(expert["gate_up_bias"].clone(), activation)
            tensors["down_bias"] = expert["down_bias"].clone()
        return tensors

    def rearrange(self, source_S: Sequence[int]) -> None:
        self._experts = [self._experts[source] for source in source_S]

    def run(self, x_AH: Tensor, count_S: Tensor, out_AH: Tensor) -> None:
        x_AH = x_AH.contiguous()
        start = 0
        for slot, count in enumerate(count_S.tolist()):
            for first, rows, padded in row_blocks(count):
                begin = start + first
                # Padding rows are the next slot's: their results are dropped.
                x = x_AH[begin : begin + padded]
                if len(x) < padded:
                    tail = _BUFFERS.take("x", padded, self.shape.hidden, self.shape.dtype)
                    tail[: len(x)] = x
                    x = tail
                out_AH[begin : begin + rows] = self._expert(slot, x)[:rows]
            start += count

    def layer(self, x_TH: Tensor, slot_TK: Tensor, gate_TK: Tensor, out_TH: Tensor) -> None:
        shape, x_TH = self.shape, x_TH.contiguous()
        order = torch.empty(slot_TK.numel(), dtype=torch.int64)
        row_TK = torch.empty_like(slot_TK)
        offset = np.empty(shape.slots + 1, np.int64)
        sort_slots(
            as_array(slot_TK.view(-1)), as_array(order), offset, as_array(row_TK.view(-1))
        )
        token_A = order.div_(max(slot_TK.shape[1], 1), rounding_mode="floor")
        y_AH = _BUFFERS.take("y", len(order), shape.hidden, shape.dtype)
        starts = offset.tolist()
        for slot, (start, stop) in enumerate(itertools.pairwise(starts)):
            for first, rows, padded in row_blocks(stop - start):
                begin = start + first
                x = _BUFFERS.take("x", padded, shape.hidden, shape.dtype)
                torch.index_select(x_TH, 0, token_A[begin : begin + rows], out=x[:rows])
                y_AH[begin : begin + rows] = self._expert(slot, x)[:rows]
        scratch = np.empty(shape.hidden, np.float32)
        combine_rows(
            as_array(y_AH), as_array(row_TK), as_array(gate_TK), scratch, as_array(out_TH)
        )

    def _expert(self, slot: int, x_AH: Tensor) -> Tensor:
        expert = self._experts[slot]
        gate_up = packed_linear(x_AH, expert["gate_up"], expert.get("gate_up_bias"))
        act = _BUFFERS.take("act", len(x_AH), self.shape.intermediate, self.shape.dtype)
        if self._gate_code is None:
            gate, up = gate_up.tensor_split(2, dim=1)
            act.copy_(gated_inplace(gate, up, self.shape.activation))
        else:
            gated_rows(
                as_array(gate_up), self._gate_code, self._limit, self._alpha, as_array(act)
            )
        return packed_linear(act, expert["down"], expert.get("down_bias"))

    def _packed(self, tensors: SlotTensors) -> SlotTensors:
        expert: dict[str, Any] = {
            "gate_up": pack(gate_rows_first(tensors["gate_up"], self.shape.activation)),
            "down": pack(tensors["down"]),
        }
        if self.shape.bias:
            bias = gate_rows_first(tensors["gate_up_bias"], self.shape.activation)
            # Own copies: a caller may reuse its tensors.
            expert["gate_up_bias"], expert["down_bias"] = bias.clone(), tensors["down_bias"].clone()
        return expert
