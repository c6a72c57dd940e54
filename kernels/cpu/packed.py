"""The grouped expert MLP on the CPU with prepacked oneDNN weights.

Serves processors with matrix units, or with vectors for which panels (`panels.py`) were not
measured. Rows run in blocks of few fixed sizes (`row_blocks.py`), so that a block's gate, up and
act stay in cache. Uses torch's private packing operators, found by trial (`packed_available`);
where they are missing, `weights.py` takes the torch backend. Knows nothing of plans.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation import gate_rows_first, stored_rows
from ..backend import BlockSizes, SlotShape, SlotTensors
from .gates import gated_rows
from .huge_pages import use_huge_pages
from .row_blocks import compute_in_blocks
from .scratch import SCRATCH

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


class PackedExpert(NamedTuple):
    """One expert's matrices in oneDNN's layout, gate rows first."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class PackedSlots:
    """Packed weights per slot; the unpacked tensors are not kept."""

    name = "packed"

    def __init__(self, shape: SlotShape, block_sizes: BlockSizes) -> None:
        self.shape, self.block_sizes = shape, block_sizes
        self._experts: list[PackedExpert] = [self._packed(shape.zero_expert())] * shape.slots

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
        compute_in_blocks(x_AH, count_S.tolist(), self.block_sizes, self._block, out_AH)

    def _block(self, slot: int, x: Tensor) -> Tensor:
        """The rows of one block through the expert of their slot."""
        expert = self._experts[slot]
        gate_up = packed_linear(x, expert.gate_up, expert.gate_up_bias)
        act = SCRATCH.take("act", len(x), self.shape.intermediate, self.shape.dtype)
        gated_rows(gate_up, self.shape.activation, act)
        return packed_linear(act, expert.down, expert.down_bias)

    def _packed(self, tensors: SlotTensors) -> PackedExpert:
        activation = self.shape.activation
        gate_up, down = gate_rows_first(tensors["gate_up"], activation), tensors["down"]
        if not self.shape.bias:
            return PackedExpert(pack(gate_up), pack(down), None, None)
        # Own copies: a caller may reuse its tensors.
        gate_up_bias = gate_rows_first(tensors["gate_up_bias"], activation).clone()
        return PackedExpert(pack(gate_up), pack(down), gate_up_bias, tensors["down_bias"].clone())
