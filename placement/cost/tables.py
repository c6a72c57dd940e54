"""Measured tables read between their points.

Linear in the value itself, never in its logarithm (that was measured to err by 12 to 14 %). Below
the first point the first value holds; past the last the last slope goes on, and the caller is
told, because nobody measured there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def interpolate(
    at: npt.ArrayLike, points: Sequence[float], values: Sequence[float]
) -> tuple[FloatArray, bool]:
    """(values at `at`, whether any of them lies past the last point). points must increase."""
    x = np.asarray(at, np.float64)
    inside = np.interp(x, points, values)
    past = x > points[-1]
    if not past.any():
        return inside, False
    slope = 0.0
    if len(points) > 1:
        slope = max(0.0, (values[-1] - values[-2]) / (points[-1] - points[-2]))
    return np.where(past, values[-1] + slope * (x - points[-1]), inside), True
