"""Slots ordered by (expert, slot): the order in which an expert's tokens fill its slots.

Built once per plan and kept on the device; knows no tokens and no quotas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import InputError


class DispatchTable:
    """The segments of one layer: one per filled slot.

    segment_expert, segment_slot, segment_first: [P] int32 on the device; segment_first is the
    first segment of the same expert. experts: E, the highest expert id plus one.
    """

    def __init__(self, slot_expert_S: Sequence[int], device: torch.device) -> None:
        filled = sorted((expert, slot) for slot, expert in enumerate(slot_expert_S) if expert >= 0)
        if not filled:
            raise InputError("the slot table holds no expert")
        first: dict[int, int] = {}
        for position, (expert, _) in enumerate(filled):
            first.setdefault(expert, position)
        self.experts = filled[-1][0] + 1
        if len(first) != self.experts:
            missing = next(e for e, held in enumerate(first) if e != held)
            raise InputError(f"expert {missing} stands in no slot")
        self.has_replicas = len(filled) > len(first)
        self.slot_expert_S = list(slot_expert_S)
        columns = (
            [expert for expert, _ in filled],
            [slot for _, slot in filled],
            [first[expert] for expert, _ in filled],
        )
        self.segment_expert, self.segment_slot, self.segment_first = (
            torch.tensor(column, dtype=torch.int32, device=device) for column in columns
        )
