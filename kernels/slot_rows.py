"""Which row of the stacked weights each slot reads: moving experts between slots moves no bytes.

Several slots may read one row (copies of an expert on one rank). Knows numbers only, no tensors.

Invariant: there are as many rows as slots, so a slot that must stop sharing finds a free row.
"""

from __future__ import annotations


class SlotTable:
    """rows[s] is the row slot s reads; starts as the identity."""

    def __init__(self, slots: int) -> None:
        self.rows = list(range(slots))

    def row_to_write(self, slot: int) -> int:
        """The row to fill for `slot`: its own, or the lowest free one where its row is shared."""
        row = self.rows[slot]
        if self.rows.count(row) > 1:
            row = min(set(range(len(self.rows))) - set(self.rows))
            self.rows[slot] = row
        return row
