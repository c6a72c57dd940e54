"""A model's dense layers on processors for which torch has no fast bfloat16 product.

There torch multiplies bfloat16 some ten times slower than float32 (measured on Zen 2); panels do
it at float32's speed, and a row's bits depend on that row alone. Elsewhere layers stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .packed import packed_available
from .panel_loops import CHUNK_ROWS, dense_rows
from .panel_matrix import Panels, factor_dtype, panels_available
from .scalars import as_array
from .scratch import SCRATCH
from .tiles import PANEL


class PanelLinear(nn.Module):
    """y = x W^T + b in bfloat16, summed in float32, the weights held as panels."""

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Says shape and type to those who ask; its numbers are in the panels.
        self.weight = torch.empty_like(weight, device="meta")
        self._panels = Panels(1, self.out_features, self.in_features, weight.dtype)
        self._panels.set(0, weight)
        if linear.bias is not None:
            self._panels.bias[0, : self.out_features] = linear.bias.detach().float().numpy()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        y = torch.empty(len(rows), self.out_features, dtype=x.dtype)
        factor = factor_dtype(x.dtype)
        scratch = (
            SCRATCH.take_array("dense_x", CHUNK_ROWS, self._panels.row_elements, factor),
            SCRATCH.take_array("dense_block", CHUNK_ROWS, PANEL, torch.float32),
        )
        panels = self._panels
        dense_rows(as_array(rows), panels.values[0], panels.bias[0], scratch, as_array(y))
        return y.view(*x.shape[:-1], self.out_features)


def use_panels(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace the model's linear layers where that is faster here; returns how many were."""
    if dtype != torch.bfloat16 or packed_available(dtype) or not panels_available(dtype):
        return 0
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(parent, name, PanelLinear(child))
                replaced += 1
    return replaced
