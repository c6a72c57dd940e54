"""The names of array types that every floor uses: what an element is, in one word.

Axes stand in the variable's own name (load_WE, slots_LGC). A type that one module alone uses is
named there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SlotArray = npt.NDArray[np.int16]        # expert ids in slots, -1 = empty
Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
