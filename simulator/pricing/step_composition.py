"""Composition: which trace tokens meet in a step, and on which rank each is at home.

Knows token indices and ranks. Knows nothing of experts, plans or time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...foundation.arrays import IntArray


@dataclass(frozen=True, eq=False)
class Composition:
    """One step: `token` [A] indices into the trace, `home` [A] ranks."""

    token: IntArray
    home: IntArray
