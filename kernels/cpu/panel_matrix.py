"""Matrices held as panels (`cpu_tiles.py`), and which types this machine multiplies so.

Knows tensors and panels; knows nothing of experts, slots or layers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .huge_pages import use_huge_pages
from .tiles import (
    HAS_FUSED_PRODUCTS,
    HAS_PAIR_PRODUCTS,
    PANEL,
    from_panels,
    padded_columns,
    to_panels,
)


def panels_available(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies panels of `dtype`."""
    return HAS_FUSED_PRODUCTS and dtype in (torch.float32, torch.bfloat16)


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows are held in to multiply panels of `dtype`: float32 where no pairs multiply."""
    return dtype if HAS_PAIR_PRODUCTS else torch.float32


class Panels:
    """One matrix [columns, depth] per slot, and its bias (zero where there is none).

    values: [slots, P, words, PANEL]; a word is one float32, or two bfloat16 values along depth.
    """

    def __init__(self, slots: int, columns: int, depth: int, dtype: torch.dtype) -> None:
        self._depth, self._dtype = depth, dtype
        per_word = 4 // dtype.itemsize
        self.words = -(-depth // per_word)
        self.row_elements = self.words * per_word
        panels = padded_columns(columns) // PANEL
        word_type = np.float32 if dtype == torch.float32 else np.uint32
        self.values = np.zeros((slots, panels, self.words, PANEL), word_type)
        self.bias = np.zeros((slots, panels * PANEL), np.float32)

    def set(self, row: int, matrix_NK: Tensor) -> None:
        padded = torch.zeros(len(matrix_NK), self.row_elements, dtype=self._dtype)
        padded[:, : self._depth] = matrix_NK
        values = self.values[row]
        to_panels(padded.view(torch.int32).numpy().view(values.dtype), values)
        use_huge_pages(values.ctypes.data, values.nbytes)

    def get(self, row: int, columns: int) -> Tensor:
        words = torch.from_numpy(from_panels(self.values[row], columns).view(np.int32))
        return words.view(self._dtype)[:, : self._depth].contiguous()


def narrowed(bias: NDArray[np.float32], dtype: torch.dtype) -> Tensor:
    """A new tensor of what was widened, bit for bit: bfloat16 is the upper half of a float32."""
    tensor = torch.from_numpy(bias.copy())
    if dtype == torch.float32:
        return tensor
    return (tensor.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
