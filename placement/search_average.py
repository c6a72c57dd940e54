"""Local search on average loads under an even split: exchanges, then annealing over copies too.

What matters here is one number per device, the sum of its copies' even shares over its speed.
Knows average loads of one layer, slots and speeds. Knows nothing of steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .compiled import RandomState, compiled, next_below, next_random

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SlotArray = npt.NDArray[np.int16]


def even_device_load(load_E: FloatArray, slots_GC: SlotArray) -> FloatArray:
    """[G] tokens per device when each expert's copies share its tokens evenly (fluid)."""
    held = slots_GC >= 0
    copies_E = np.bincount(slots_GC[held].astype(np.int64), minlength=len(load_E))
    share_E = load_E / np.maximum(copies_E, 1)
    return np.asarray(np.where(held, share_E[np.maximum(slots_GC, 0)], 0.0).sum(axis=1))


def swap_with_hottest(
    slots_GC: SlotArray, load_E: FloatArray, speed_G: FloatArray, *, most_swaps: int = 10_000
) -> SlotArray:
    """Exchange slots between the hottest device and another while the worse of the two cools most.

    Copies' counts stay. Returns new slots. Ties: lower device, then lower slots. Deterministic.
    """
    slots_GC = slots_GC.copy()
    copies_E = np.bincount(slots_GC[slots_GC >= 0].astype(np.int64), minlength=len(load_E))
    share_E = np.asarray(load_E, np.float64) / np.maximum(copies_E, 1)
    _swap_with_hottest(slots_GC, share_E, np.asarray(speed_G, np.float64), most_swaps)
    return slots_GC


@compiled
def _held(slots_GC: SlotArray, g: int, expert: int) -> bool:
    for c in range(slots_GC.shape[1]):
        if slots_GC[g, c] == expert:
            return True
    return False


@compiled
def _swap_with_hottest(
    slots_GC: SlotArray, share_E: FloatArray, speed_G: FloatArray, most_swaps: int
) -> None:
    devices, width = slots_GC.shape
    load_G = np.zeros(devices)
    for g in range(devices):
        for c in range(width):
            if slots_GC[g, c] >= 0:
                load_G[g] += share_E[slots_GC[g, c]]
    for _ in range(most_swaps):
        hot = int(np.argmax(load_G / speed_G))
        worst = load_G[hot] / speed_G[hot]
        best = worst * (1 - 1e-12)
        best_c, best_g, best_d = -1, -1, -1
        for c in range(width):
            e = slots_GC[hot, c]
            if e < 0:
                continue
            for g in range(devices):
                if g == hot or load_G[g] / speed_G[g] >= best or _held(slots_GC, g, e):
                    continue
                for d in range(width):
                    f = slots_GC[g, d]
                    if f < 0 or share_E[f] >= share_E[e]:
                        continue
                    gain = share_E[e] - share_E[f]
                    after = max((load_G[hot] - gain) / speed_G[hot], (load_G[g] + gain) / speed_G[g])
                    if after < best and not _held(slots_GC, hot, f):
                        best, best_c, best_g, best_d = after, c, g, d
        if best_c < 0:
            return
        e, f = slots_GC[hot, best_c], slots_GC[best_g, best_d]
        slots_GC[hot, best_c], slots_GC[best_g, best_d] = f, e
        load_G[hot] += share_E[f] - share_E[e]
        load_G[best_g] += share_E[e] - share_E[f]


def anneal_average(
    slots_GC: SlotArray,
    load_E: FloatArray,
    slots_G: IntArray,
    speed_G: FloatArray,
    moves: int,
    state: RandomState,
) -> SlotArray:
    """Anneal over exchanges and changes of copies' counts; returns the placement with least peak.

    Cost: the sum over devices of squared overload, in units of perfect balance. Empty slots stay
    empty unless a copy is put there. Never two copies of an expert on a device.
    """
    total = float(np.sum(load_E))
    if total <= 0 or len(slots_G) < 2:
        return slots_GC.copy()
    scaled_E = np.asarray(load_E, np.float64) * (float(speed_G.sum()) / total)
    return _anneal_average(
        np.ascontiguousarray(slots_GC), scaled_E, np.asarray(slots_G, np.int64),
        np.asarray(speed_G, np.float64), moves, HOT, COLD, state,
    )


ENOUGH = 2e-4               # above perfect balance: nothing left to win
HOT, COLD = 4e-3, 1e-7      # of squared overload; a lower start leaves the counts as they are


@compiled
def _square_over(load: float, speed: float) -> float:
    over = load / speed - 1.0
    return over * over if over > 0.0 else 0.0


@compiled
def _anneal_average(
    slots_GC: SlotArray,
    load_E: FloatArray,
    slots_G: IntArray,
    speed_G: FloatArray,
    moves: int,
    hot: float,
    cold: float,
    state: RandomState,
) -> SlotArray:
    devices, experts = len(slots_G), len(load_E)
    slots_GC = slots_GC.copy()
    copies_E = np.zeros(experts, np.int64)
    holder_ER = np.full((experts, devices), -1, np.int16)   # devices of each copy, any order
    held_EG = np.zeros((experts, devices), np.bool_)
    for g in range(devices):
        for c in range(slots_G[g]):
            e = slots_GC[g, c]
            if e >= 0:
                holder_ER[e, copies_E[e]] = g
                copies_E[e] += 1
                held_EG[e, g] = True
    load_G = np.zeros(devices)
    for e in range(experts):
        for r in range(copies_E[e]):
            load_G[holder_ER[e, r]] += load_E[e] / copies_E[e]
    trial_G = load_G.copy()
    best_peak, best_GC = (load_G / speed_G).max(), slots_GC.copy()
    hottest = int(np.argmax(load_G / speed_G))
    cooling = (cold / hot) ** (1.0 / max(moves - 1, 1))
    temperature = hot
    for move in range(moves):
        if best_peak <= 1.0 + ENOUGH:
            break
        temperature *= cooling
        # Every other move starts at the hottest device: nothing else lowers the peak.
        g1 = hottest if move & 1 else next_below(state, devices)
        c1 = next_below(state, slots_G[g1])
        e1 = slots_GC[g1, c1]
        allowed = -temperature * np.log(1.0 - next_random(state))
        if e1 >= 0 and (copies_E[e1] == 1 or next_random(state) < 0.7):
            g2 = next_below(state, devices)
            c2 = next_below(state, slots_G[g2])
            e2 = slots_GC[g2, c2]
            if g2 == g1 or e1 == e2 or held_EG[e1, g2] or (e2 >= 0 and held_EG[e2, g1]):
                continue
            gain = load_E[e1] / copies_E[e1]
            if e2 >= 0:
                gain -= load_E[e2] / copies_E[e2]
            change = (
                _square_over(load_G[g1] - gain, speed_G[g1]) - _square_over(load_G[g1], speed_G[g1])
                + _square_over(load_G[g2] + gain, speed_G[g2])
                - _square_over(load_G[g2], speed_G[g2])
            )
            if change > allowed:
                continue
            slots_GC[g1, c1], slots_GC[g2, c2] = e2, e1
            load_G[g1] -= gain
            load_G[g2] += gain
            _rehold(holder_ER, held_EG, copies_E, e1, g1, g2)
            if e2 >= 0:
                _rehold(holder_ER, held_EG, copies_E, e2, g2, g1)
        else:
            e2 = next_below(state, experts)
            if e1 == e2 or held_EG[e2, g1]:
                continue
            _shift_copies(trial_G, load_E, holder_ER, copies_E, e1, e2, g1)
            change = 0.0
            for which in range(2):
                e = e1 if which == 0 else e2
                if e < 0:
                    continue
                for r in range(copies_E[e]):
                    g = holder_ER[e, r]
                    # A device that holds both is counted once, with its first expert.
                    if which == 1 and e1 >= 0 and held_EG[e1, g]:
                        continue
                    change += (
                        _square_over(trial_G[g], speed_G[g]) - _square_over(load_G[g], speed_G[g])
                    )
            if e1 < 0:
                change += (
                    _square_over(trial_G[g1], speed_G[g1]) - _square_over(load_G[g1], speed_G[g1])
                )
            accepted = change <= allowed
            for which in range(2):
                e = e1 if which == 0 else e2
                if e < 0:
                    continue
                for r in range(copies_E[e]):
                    g = holder_ER[e, r]
                    if accepted:
                        load_G[g] = trial_G[g]
                    else:
                        trial_G[g] = load_G[g]
            if accepted:
                load_G[g1] = trial_G[g1]
            else:
                trial_G[g1] = load_G[g1]
                continue
            slots_GC[g1, c1] = e2
            if e1 >= 0:
                _rehold(holder_ER, held_EG, copies_E, e1, g1, -1)
            holder_ER[e2, copies_E[e2]] = g1
            copies_E[e2] += 1
            held_EG[e2, g1] = True
        if e2 >= 0 or e1 >= 0:
            trial_G[:] = load_G
            hottest = 0
            for g in range(1, devices):
                if load_G[g] * speed_G[hottest] > load_G[hottest] * speed_G[g]:
                    hottest = g
            peak = load_G[hottest] / speed_G[hottest]
            if peak < best_peak:
                best_peak, best_GC = peak, slots_GC.copy()
    return best_GC


@compiled
def _rehold(
    holder_ER: npt.NDArray[np.int16],
    held_EG: npt.NDArray[np.bool_],
    copies_E: IntArray,
    e: int,
    source: int,
    to: int,
) -> None:
    """Expert e's copy on `source` goes to device `to`, or away (-1)."""
    last = copies_E[e] - 1
    for r in range(copies_E[e]):
        if holder_ER[e, r] == source:
            if to >= 0:
                holder_ER[e, r] = to
            else:
                holder_ER[e, r] = holder_ER[e, last]
                holder_ER[e, last] = -1
                copies_E[e] = last
            break
    held_EG[e, source] = False
    if to >= 0:
        held_EG[e, to] = True


@compiled
def _shift_copies(
    trial_G: FloatArray,
    load_E: FloatArray,
    holder_ER: npt.NDArray[np.int16],
    copies_E: IntArray,
    e1: int,
    e2: int,
    g1: int,
) -> None:
    """trial_G after e1 loses its copy on g1 (none where e1 < 0) and e2 gains one there."""
    if e1 >= 0:
        before, after = load_E[e1] / copies_E[e1], load_E[e1] / (copies_E[e1] - 1)
        for r in range(copies_E[e1]):
            trial_G[holder_ER[e1, r]] += after - before
        trial_G[g1] -= after
    before, after = load_E[e2] / copies_E[e2], load_E[e2] / (copies_E[e2] + 1)
    for r in range(copies_E[e2]):
        trial_G[holder_ER[e2, r]] += after - before
    trial_G[g1] += after
