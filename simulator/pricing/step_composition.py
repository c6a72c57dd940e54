"""Composition: which trace tokens meet in a step, and on which rank each is at home.

Knows token indices and ranks. Knows nothing of experts, plans or time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Composition:
    """One step: `token` [A] indices into the trace, `home` [A] ranks."""

    token: IntArray
    home: IntArray
