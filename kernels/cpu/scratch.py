"""Memory that the expert layers of one thread share between calls. Knows sizes and types only."""

from __future__ import annotations

import threading
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .huge_pages import use_huge_pages
from .scalars import as_array


class _Scratch(threading.local):
    """Named matrices, one set per thread; each grows to the most rows ever asked for."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._arrays: dict[tuple[str, int, torch.dtype], NDArray[Any]] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] of scratch; holds whatever was last written there."""
        held = self._held.get((name, columns, dtype))
        if held is None or len(held) < rows:
            held = torch.zeros(rows, columns, dtype=dtype)
            use_huge_pages(held.data_ptr(), held.numel() * held.element_size())
            self._held[name, columns, dtype] = held
            self._arrays[name, columns, dtype] = as_array(held)
        return held[:rows]

    def take_array(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> NDArray[Any]:
        """`take` as compiled loops see it (`as_array`), without making a tensor each time."""
        array = self._arrays.get((name, columns, dtype))
        if array is None or len(array) < rows:
            self.take(name, rows, columns, dtype)
            array = self._arrays[name, columns, dtype]
        return array[:rows]


SCRATCH = _Scratch()
