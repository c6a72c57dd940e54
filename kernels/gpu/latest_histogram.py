"""The latest rows per expert that have reached the host, without ever waiting for the device.

Knows counts only; `tile_configs.py` makes block sizes of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tile_sizes import rows_percentile


class HistogramWatch:
    """Keeps the newest histogram that has arrived.

    Blocks picked from a histogram a step old are as right as any: they change speed, not bits.
    """

    def __init__(self) -> None:
        self._seen: list[int] | None = None
        self._arriving: Tensor | None = None
        self._arrived: Any = None  # torch.cuda.Event, which has no types

    def saw(self, counts: list[int]) -> None:
        """Take over counts the host already has."""
        self._seen = counts

    def copy(self, count_E: Tensor) -> None:
        """Start copying a step's counts, unless an earlier copy is still under way."""
        if count_E.device.type != "cuda":
            self._seen = count_E.tolist()
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self._arrived is not None and not self._arrived.query():
            return
        self._collect()
        self._arriving = torch.empty(count_E.shape, dtype=count_E.dtype, pin_memory=True)
        self._arriving.copy_(count_E, non_blocking=True)
        event: Any = torch.cuda.Event
        self._arrived = event()
        self._arrived.record()

    def bucket(self, rows: int, slots: int) -> tuple[int, int]:
        """(active experts, 90th percentile of rows), scaled to a step of `rows` rows.

        Before the first histogram: an even spread over all slots.
        """
        self._collect()
        if self._seen is None or not sum(self._seen):
            return min(rows, slots), -(-rows // slots)
        active, rows_p90 = rows_percentile(self._seen)
        return active, -(-rows_p90 * rows // sum(self._seen))

    def _collect(self) -> None:
        if self._arrived is None or torch.cuda.is_current_stream_capturing():
            return  # an event may not be asked while a graph is being captured
        if self._arriving is not None and self._arrived.query():
            self._seen, self._arriving, self._arrived = self._arriving.tolist(), None, None
