"""Lower bounds: how good any plan could be on given steps, whatever it places where.

Knows loads, slots and speeds; never looks at a plan, so a bound holds for all of them. Every bound
here is proved in its docstring; `checked_gap` refuses a bound above the objective, always.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import LoadmasterError
from .compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ROUNDING = 1e-9     # of the objective: sums in another order may differ by this much


class BoundError(LoadmasterError):
    """A bound above an objective that was reached: one of the two is wrong. Always a defect."""


def checked_gap(objective: float, bound: float, where: str) -> tuple[float, float]:
    """(bound, gap) with gap = (objective − bound) / bound; 0 where both are 0.

    A bound within rounding of the objective is lowered to it. Raises BoundError when the bound is
    above the objective: no plan may be reported as better than the best possible.
    """
    if not (np.isfinite(objective) and np.isfinite(bound)):
        raise BoundError(f"{where}: objective {objective} and bound {bound} must be finite")
    if bound > objective + ROUNDING * max(abs(objective), 1.0):
        raise BoundError(
            f"{where}: bound {bound!r} is above the objective {objective!r}; please report this "
            "with the trace that shows it"
        )
    bound = min(bound, objective)
    return bound, (objective - bound) / bound if bound > 0 else 0.0


def balance_bound_W(load_WE: FloatArray, slots: int, speed_G: FloatArray) -> FloatArray:
    """[W] least possible imbalance of each step under any placement, copies and split.

    load_WE [W, E] tokens; slots: S in the layer. Steps without load give 1.
    Proof: (1) a maximum is not below the mean. (2) An expert with r copies is computed by at most r
    devices, so some device finishes no sooner than load / (sum of the r highest speeds); all
    experts together have at most S copies and at most G each. For a level z expert e needs
    r_e(z) = least r with load_e <= z · (r highest speeds); if the r_e sum above S, z is out of
    reach. The bound is the least z that passes, found to 1e-12 by bisection and rounded down.
    """
    speeds = np.sort(np.asarray(speed_G, np.float64))[::-1]
    total_W = load_WE.sum(axis=1)
    ideal_W = np.where(total_W > 0, total_W / speeds.sum(), 1.0)
    relative = np.ascontiguousarray(load_WE / ideal_W[:, None], np.float64)
    return _balance_bound(relative, slots, np.cumsum(speeds))


@compiled
def _balance_bound(relative_WE: FloatArray, slots: int, fastest_R: FloatArray) -> FloatArray:
    steps, experts = relative_WE.shape
    bound_W = np.ones(steps)
    for w in range(steps):
        low, high = 1.0, max(1.0, relative_WE[w].max() / fastest_R[0])
        if high == 1.0 or _copies_needed(relative_WE[w], low, fastest_R) <= slots:
            continue
        for _ in range(60):
            middle = 0.5 * (low + high)
            if _copies_needed(relative_WE[w], middle, fastest_R) <= slots:
                high = middle
            else:
                low = middle
        bound_W[w] = low
    return bound_W


@compiled
def _copies_needed(relative_E: FloatArray, level: float, fastest_R: FloatArray) -> int:
    needed = 0
    for load in relative_E:
        copies = int(np.searchsorted(fastest_R, load / level * (1.0 - 1e-12))) + 1
        needed += min(copies, len(fastest_R) + 1)
    return needed

