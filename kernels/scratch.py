"""Memory that the expert layers of one thread share between calls. Knows sizes and types only."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .huge_pages import use_huge_pages


class _Scratch(threading.local):
    """Named matrices, one set per thread; each grows to the most rows ever asked for."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] of scratch; holds whatever was last written there."""
        held = self._held.get((name, columns, dtype))
        if held is None or len(held) < rows:
            held = torch.zeros(rows, columns, dtype=dtype)
            use_huge_pages(held.data_ptr(), held.numel() * held.element_size())
            self._held[name, columns, dtype] = held
        return held[:rows]


SCRATCH = _Scratch()
