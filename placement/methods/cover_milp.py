"""Whether a layer's experts of different sizes fit into its devices' bytes at all, by a program.

Rules of thumb such as largest-first miss packings that exist; this finds one or proves that there
is none. Experts of one size need equal memory, so the program counts them by size. Knows sizes,
slots and bytes; loads only order what the counts leave open. Knows nothing of steps or search.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pulp

from ...errors import InfeasibleError
from ...foundation.arrays import FloatArray, IntArray, SlotArray
from .milp import NoAnswerError, SolverError, solve, whole_grid

NODES = 10_000      # of the search tree


def cover_by_program(
    load_E: FloatArray, size_E: FloatArray, slots_G: IntArray, capacity_G: FloatArray,
    speed_G: FloatArray,
) -> SlotArray:
    """One replica of every expert [G, C], every device within its slots and bytes.

    n[s][g] = experts of size s on device g, whole numbers
    (1) sum_g n[s][g] = count[s]                every expert is somewhere
    (2) sum_s size[s] n[s][g] <= room[g], sum_s n[s][g] <= slots[g]
    Which experts of a size: heaviest first, to the device that would finish first.
    Raises InfeasibleError; it says whether that is proved.
    """
    size_S, class_E, count_S = np.unique(
        size_E.astype(np.int64), return_inverse=True, return_counts=True
    )
    room = np.floor(np.minimum(capacity_G, float(size_E.sum()))).astype(np.int64)
    unit = max(1, int(np.gcd.reduce(size_S)))          # small whole numbers keep HiGHS exact
    size, room = size_S // unit, room // unit
    n = whole_grid("n", np.minimum(count_S[:, None], slots_G))
    problem = pulp.LpProblem("cover", pulp.LpMinimize)
    problem += pulp.lpSum([])
    for s in range(len(size)):
        problem += pulp.lpSum(n[s]) == int(count_S[s])                                    # (1)
    for g in range(len(slots_G)):
        held = range(len(size))
        problem += pulp.lpSum(int(size[s]) * n[s][g] for s in held) <= int(room[g])       # (2)
        problem += pulp.lpSum(n[s][g] for s in held) <= int(slots_G[g])
    where = "the layer's experts into the devices' memory (every layer has the same part of it)"
    try:
        solve(problem, nodes=NODES)
    except NoAnswerError as error:
        raise InfeasibleError(
            f"nothing packs {where}: proved; raise expert_memory_bytes, or add devices"
        ) from error
    except SolverError as error:
        raise InfeasibleError(
            f"no packing was found for {where}; it is not proved that there is none: raise "
            "expert_memory_bytes, or give a plan that fits as the current one"
        ) from error
    n_SG = np.array([[round(v.varValue or 0.0) for v in row] for row in n], np.int64)
    kept = (n_SG.sum(axis=1) == count_S).all() and (n_SG.sum(axis=0) <= slots_G).all()
    assert kept and (size @ n_SG <= room).all(), "HiGHS broke a rule of the program"
    return _chosen(n_SG, class_E, load_E, slots_G, speed_G)


def _chosen(
    n_SG: IntArray, class_E: npt.NDArray[np.intp], load_E: FloatArray, slots_G: IntArray,
    speed_G: FloatArray,
) -> SlotArray:
    """Experts for the counts: heaviest first, ties to the lower expert and device."""
    slots_GC = np.full((len(slots_G), int(slots_G.max())), -1, np.int16)
    used_G, busy_G, left_SG = np.zeros_like(slots_G), np.zeros(len(slots_G)), n_SG.copy()
    for e in np.lexsort((np.arange(len(load_E)), -load_E)):
        free_G = left_SG[class_E[e]] > 0
        g = int(np.argmin(np.where(free_G, (busy_G + load_E[e]) / speed_G, np.inf)))
        slots_GC[g, used_G[g]] = e
        used_G[g] += 1
        busy_G[g] += load_E[e]
        left_SG[class_E[e], g] -= 1
    return slots_GC
