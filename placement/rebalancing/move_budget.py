"""What may be sent when the current plan changes: moves, bytes, or both, over all layers.

Knows counts and sizes of experts. Knows nothing of searches or links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UsageError
from ...foundation.arrays import FloatArray, IntArray, SlotArray
from ...traces.model_spec import ModelSpec
from ..plan import Plan

DEFAULT_SHARE = 0.1      # of filled slots that may move where no budget is given
NEVER = 1e9              # price of what no budget covers


@dataclass(frozen=True)
class Budget:
    """What may be sent, over all layers; None = no limit of that kind."""

    moves: int | None
    bytes: int | None
    bytes_E: IntArray | None

    @classmethod
    def of(
        cls, current: Plan, model: ModelSpec | None, moves: int | None, most_bytes: int | None
    ) -> Budget:
        """Checked; DEFAULT_SHARE of the filled slots where nothing is given."""
        for what, value in (("max_moves", moves), ("max_bytes", most_bytes)):
            if value is not None and value < 0:
                raise UsageError(f"{what} {value} must be at least 0")
        if most_bytes is None:
            if moves is None:
                moves = int(DEFAULT_SHARE * int((current.slots >= 0).sum()))
            return cls(moves, None, None)
        if model is None or not model.knows_bytes:
            raise UsageError(
                "--max-bytes needs the experts' sizes: give --model, or --max-moves instead"
            )
        return cls(moves, most_bytes, model.bytes_per_expert_E())

    def price_E(self, experts: int) -> FloatArray:
        """[E] share of the whole that sending each expert takes, the tighter of the two."""
        price_E = np.zeros(experts)
        if self.moves is not None:
            price_E += 1.0 / self.moves if self.moves else NEVER
        if self.bytes is not None and self.bytes_E is not None:
            by_bytes = self.bytes_E / self.bytes if self.bytes else NEVER
            price_E = np.maximum(price_E, by_bytes)
        return np.minimum(price_E, NEVER)

    def covers(self, experts: Sequence[int]) -> bool:
        """Whether all of these may be sent, in whole moves and bytes."""
        if self.moves is not None and len(experts) > self.moves:
            return False
        if self.bytes is None or self.bytes_E is None:
            return True
        return sum(int(self.bytes_E[e]) for e in experts) <= self.bytes


def sent(before_GC: SlotArray, after_GC: SlotArray) -> list[int]:
    """Experts that devices hold after and did not before, one per device, in order."""
    return [
        e for before, after in zip(before_GC, after_GC, strict=True)
        for e in sorted(set(after.tolist()) - set(before.tolist())) if e >= 0
    ]
