"""Exact running token counts, kept where the layer runs.

Logical counts (per expert) are the planner's input, physical ones (per slot) are what ran.
Additive over steps; switched by a flag on the device, so that turning recording on or off
neither recompiles a kernel nor waits for one. Read once per window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


class LoadRecord:
    """logical_E and physical_S, int64; `enabled` int32 [1], nonzero = count."""

    def __init__(self, experts: int, slots: int, device: torch.device | str) -> None:
        self.logical_E = torch.zeros(experts, dtype=torch.int64, device=device)
        self.physical_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self.enabled = torch.ones(1, dtype=torch.int32, device=device)

    def check(self, experts: int, slots: int, device: torch.device) -> None:
        """Raise InputError unless it is for a layer of this size, there.

        A kernel adds at every expert and slot of the layer, whatever the record's size.
        """
        held = (self.logical_E.numel(), self.physical_S.numel())
        where = {self.logical_E.device, self.physical_S.device, self.enabled.device}
        if held != (experts, slots) or where != {device}:
            raise InputError(
                f"the load record holds {held[0]} experts and {held[1]} slots on "
                f"{', '.join(sorted(map(str, where)))}; the layer has {experts} experts and "
                f"{slots} slots on {device}"
            )

    def switch(self, on: bool) -> None:
        """Count from the next layer on, or stop counting."""
        self.enabled.fill_(int(on))

    def take(self) -> tuple[Tensor, Tensor]:
        """The counts so far, on the host, and start again from zero."""
        counts = self.logical_E.cpu().clone(), self.physical_S.cpu().clone()
        self.logical_E.zero_()
        self.physical_S.zero_()
        return counts
