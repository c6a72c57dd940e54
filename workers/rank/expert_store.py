"""The experts of one layer that one rank holds, by number, in as many blocks of memory as needed.

Knows expert tensors and the kernels' slots. Knows nothing of plans, epochs or other ranks. Blocks
let new experts arrive next to the old ones: a plan switch then only changes which are asked for.
Every block is a call of the kernels, so that afterwards they are gathered into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from ...errors import LoadmasterError
from ...foundation.arrays import IntArray
from ...kernels.grouped import ExpertWeights, grouped_experts
from .weight_files import ExpertTensors


class ExpertStore:
    """expert id -> its weights, ready to compute. A physical slot is numbered block after block."""

    def __init__(self, allocate: Callable[[int], ExpertWeights]) -> None:
        """allocate: memory for a number of experts of this layer."""
        self._allocate = allocate
        self._blocks: list[ExpertWeights] = []
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []

    @property
    def experts(self) -> list[int]:
        """The experts held, ascending."""
        return sorted(self._slot_of)

    @property
    def capacity(self) -> int:
        """Physical slots, used or free."""
        return sum(block.shape.slots for block in self._blocks)

    def reserve(self, experts: int) -> None:
        """Have memory for this many more experts."""
        missing = experts - len(self._free)
        if missing > 0:
            first = self.capacity
            self._blocks.append(self._allocate(missing))
            self._free.extend(range(first, first + missing))

    def put(self, expert: int, tensors: ExpertTensors) -> None:
        """Hold an expert; its tensors are copied. Replaces what was held under the number."""
        if expert not in self._slot_of:
            self.reserve(1)
            self._slot_of[expert] = self._free.pop(0)
        block, index = self._locate(self._slot_of[expert])
        block.load_slot(index, tensors)

    def get(self, expert: int) -> ExpertTensors:
        """An expert's tensors, bit for bit as `put` got them."""
        if expert not in self._slot_of:
            raise LoadmasterError(
                f"expert {expert} is not held here; held are {self.experts}: rehydrate the rank"
            )
        block, index = self._locate(self._slot_of[expert])
        return block.get_slot(index)

    def holds(self, experts: Iterable[int]) -> bool:
        """Whether all of these are held."""
        return all(e in self._slot_of for e in experts)

    def drop(self, expert: int) -> None:
        """Forget an expert and free its slot; nothing happens if it is not held."""
        slot = self._slot_of.pop(expert, None)
        if slot is not None:
            self._free.append(slot)
            self._free.sort()

    @property
    def scattered_bytes(self) -> int:
        """What `gather` would copy; 0 where all experts lie in one block."""
        if len(self._blocks) < 2:
            return 0
        return len(self._slot_of) * self._blocks[0].bytes_per_slot

    def gather(self) -> None:
        """Bring all experts into one block, ascending, with no slot to spare."""
        if len(self._blocks) < 2:
            return
        held = self.experts
        block = self._allocate(max(len(held), 1))
        for index, expert in enumerate(held):
            block.load_slot(index, self.get(expert))
        self._blocks = [block]
        self._slot_of = {expert: index for index, expert in enumerate(held)}
        self._free = list(range(len(held), block.shape.slots))

    def physical(self, experts: IntArray) -> IntArray:
        """The physical slot of each of these experts; 0 for an empty slot, which gets no rows."""
        return np.array([self._slot_of[e] if e >= 0 else 0 for e in experts.tolist()], np.int64)

    def compute(self, x_AH: Tensor, count_P: IntArray) -> Tensor:
        """Run rows, sorted by physical slot, through their experts. count_P: rows of each."""
        if len(self._blocks) == 1:
            return grouped_experts(x_AH, torch.from_numpy(count_P), self._blocks[0])
        out = torch.empty_like(x_AH)
        row = slot = 0
        for block in self._blocks:
            counts = count_P[slot : slot + block.shape.slots]
            rows = slice(row, row + int(counts.sum()))
            if rows.stop > rows.start:
                grouped_experts(x_AH[rows], torch.from_numpy(counts), block, out=out[rows])
            row, slot = rows.stop, slot + block.shape.slots
        return out

    def _locate(self, slot: int) -> tuple[ExpertWeights, int]:
        for block in self._blocks:
            if slot < block.shape.slots:
                return block, slot
            slot -= block.shape.slots
        raise LoadmasterError(f"physical slot {slot} is past the last block")
