"""Local search on average loads under an even split: exchanges, then annealing over replicas too.

What matters here is one number per device, the sum of its replicas' even shares over its speed.
Knows average loads of one layer, slots and speeds. Knows nothing of steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import RandomState, compiled, compiled_inline, next_below, next_random
from .annealer import SearchSpace, moves_price, moves_price_change, require_slots


def even_device_load(load_E: FloatArray, slots_GC: SlotArray) -> FloatArray:
    """[G] tokens per device when each expert's replicas share its tokens evenly (fluid)."""
    held = slots_GC >= 0
    replicas_E = np.bincount(slots_GC[held].astype(np.int64), minlength=len(load_E))
    share_E = load_E / np.maximum(replicas_E, 1)
    return np.asarray(np.where(held, share_E[np.maximum(slots_GC, 0)], 0.0).sum(axis=1))


def swap_with_hottest(
    slots_GC: SlotArray,
    load_E: FloatArray,
    speed_G: FloatArray,
    *,
    size_E: FloatArray | None = None,
    room_G: FloatArray | None = None,
    most_swaps: int = 10_000,
) -> SlotArray:
    """Exchange slots between the hottest device and another while the worse of the two cools most.

    size_E, room_G: bytes, where memory limits too. Replicas' counts stay. Returns new slots. Ties:
    lower device, then lower slots. Deterministic.
    """
    slots_GC = slots_GC.copy()
    replicas_E = np.bincount(slots_GC[slots_GC >= 0].astype(np.int64), minlength=len(load_E))
    share_E = np.asarray(load_E, np.float64) / np.maximum(replicas_E, 1)
    size = np.zeros(len(load_E)) if size_E is None else np.asarray(size_E, np.float64)
    left_G = np.full(len(slots_GC), np.inf) if room_G is None else room_G - np.where(
        slots_GC >= 0, size[np.maximum(slots_GC, 0)], 0.0).sum(axis=1)
    _swap_with_hottest(
        slots_GC, share_E, np.asarray(speed_G, np.float64), size, left_G, most_swaps
    )
    return slots_GC


@compiled
def _held(slots_GC: SlotArray, g: int, expert: int) -> bool:
    for c in range(slots_GC.shape[1]):
        if slots_GC[g, c] == expert:
            return True
    return False


@compiled
def _swap_with_hottest(
    slots_GC: SlotArray, share_E: FloatArray, speed_G: FloatArray, size_E: FloatArray,
    left_G: FloatArray, most_swaps: int,
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
                    if size_E[e] - size_E[f] > left_G[g] or size_E[f] - size_E[e] > left_G[hot]:
                        continue
                    gain = share_E[e] - share_E[f]
                    after = max(
                        (load_G[hot] - gain) / speed_G[hot], (load_G[g] + gain) / speed_G[g]
                    )
                    if after < best and not _held(slots_GC, hot, f):
                        best, best_c, best_g, best_d = after, c, g, d
        if best_c < 0:
            return
        e, f = slots_GC[hot, best_c], slots_GC[best_g, best_d]
        slots_GC[hot, best_c], slots_GC[best_g, best_d] = f, e
        load_G[hot] += share_E[f] - share_E[e]
        load_G[best_g] += share_E[e] - share_E[f]
        left_G[hot] += size_E[e] - size_E[f]
        left_G[best_g] += size_E[f] - size_E[e]


class _Placed(NamedTuple):
    """One layer's placement as the moves below read and change it."""

    slots_GC: Any       # [G, C] int16
    replicas_E: Any       # [E]
    holder_ER: Any      # [E, most replicas] device of each replica, any order, -1 = none
    held_EG: Any        # [E, G] bool
    load_G: Any         # [G] tokens, 1 per unit of speed = perfect balance
    trial_G: Any        # [G] scratch, equal to load_G between moves
    room_G: Any         # [G] bytes left


def improve_average(
    space: SearchSpace,
    slots_GC: SlotArray,
    load_E: FloatArray,
    moves: int,
    state: RandomState,
) -> SlotArray:
    """Anneal over exchanges and changes of replicas' counts; returns the placement of least peak.

    Cost: the sum over devices of squared overload, in units of perfect balance. Never two replicas
    of an expert on a device. Within a budget of moves the best ones are taken first, by gain per
    price, and the annealing starts cold from there: most of its moves would break the budget.
    """
    require_slots(space, slots_GC)
    total = float(np.sum(load_E))
    if total <= 0 or len(slots_GC) < 2:
        return slots_GC.copy()
    scaled_E = np.asarray(load_E, np.float64) * (float(np.sum(space.speed_G)) / total)
    start_GC = np.ascontiguousarray(slots_GC, np.int16)
    if len(space.standing_EG) == 0:
        found: SlotArray = _anneal(space, start_GC, scaled_E, moves, HOT, COLD, state)
        return found
    start_GC = _descend(space, start_GC, scaled_E)
    found = _anneal(space, start_GC, scaled_E, BUDGET_MOVES * moves, BUDGET_HOT, COLD, state)
    return found


ENOUGH = 2e-4               # above perfect balance: nothing left to win
HOT, COLD = 4e-3, 1e-7      # of squared overload; a lower start leaves the counts as they are
BUDGET_HOT, BUDGET_MOVES = 3e-5, 1


@compiled
def _placed(space: SearchSpace, slots_GC: Any, load_E: Any) -> _Placed:
    devices, experts = len(slots_GC), len(load_E)
    replicas_E, room_G = np.zeros(experts, np.int64), space.room_G.copy()
    holder_ER = np.full((experts, devices), -1, np.int16)
    held_EG = np.zeros((experts, devices), np.bool_)
    for g in range(devices):
        for e in slots_GC[g]:
            if e >= 0:
                holder_ER[e, replicas_E[e]] = g
                replicas_E[e] += 1
                held_EG[e, g] = True
                room_G[g] -= space.size_E[e]
    load_G = np.zeros(devices)
    for e in range(experts):
        for r in range(replicas_E[e]):
            load_G[holder_ER[e, r]] += load_E[e] / replicas_E[e]
    return _Placed(slots_GC, replicas_E, holder_ER, held_EG, load_G, load_G.copy(), room_G)


@compiled_inline
def _square_over(load: float, speed: float) -> float:
    over = load / speed - 1.0
    return over * over if over > 0.0 else 0.0


@compiled_inline
def _hottest(load_G: Any, speed_G: Any) -> int:
    hottest = 0
    for g in range(1, len(load_G)):
        if load_G[g] * speed_G[hottest] > load_G[hottest] * speed_G[g]:
            hottest = g
    return hottest


@compiled_inline
def _legal(
    held_EG: Any, room_G: Any, size_E: Any, g1: int, e1: int, g2: int, e2: int
) -> bool:
    """Whether slots and memory let e1 (g1) and e2 (g2) change places.

    g2 = -1: e2 gains a replica on g1 in place of e1 (-1 = an empty slot), which keeps another.
    """
    if e1 == e2 or g1 == g2 or (e2 >= 0 and held_EG[e2, g1]):
        return False
    if g2 >= 0 and held_EG[e1, g2]:
        return False
    growth = (size_E[e2] if e2 >= 0 else 0.0) - (size_E[e1] if e1 >= 0 else 0.0)
    return growth <= room_G[g1] and (g2 < 0 or -growth <= room_G[g2])


@compiled_inline
def _swap_change(
    load_G: Any, speed_G: Any, load_E: Any, replicas_E: Any, g1: int, e1: int, g2: int, e2: int
) -> float:
    """Change of cost when e1 on g1 and e2 on g2 (-1 = none) change places."""
    gain = load_E[e1] / replicas_E[e1]
    if e2 >= 0:
        gain -= load_E[e2] / replicas_E[e2]
    return (
        _square_over(load_G[g1] - gain, speed_G[g1]) - _square_over(load_G[g1], speed_G[g1])
        + _square_over(load_G[g2] + gain, speed_G[g2]) - _square_over(load_G[g2], speed_G[g2])
    )


@compiled_inline
def _recopy(
    trial_G: Any, load_E: Any, replicas_E: Any, holder_ER: Any, g1: int, e1: int, e2: int
) -> None:
    """trial_G after e1 (-1 = none) loses its replica on g1 and e2 gains one there."""
    if e1 >= 0:
        replicas = replicas_E[e1]
        before, after = load_E[e1] / replicas, load_E[e1] / (replicas - 1)
        for r in range(replicas):
            trial_G[holder_ER[e1, r]] += after - before
        trial_G[g1] -= after
    replicas = replicas_E[e2]
    before, after = load_E[e2] / replicas, load_E[e2] / (replicas + 1)
    for r in range(replicas):
        trial_G[holder_ER[e2, r]] += after - before
    trial_G[g1] += after


@compiled_inline
def _recopy_change(
    trial_G: Any, load_G: Any, speed_G: Any, load_E: Any, replicas_E: Any, holder_ER: Any,
    g1: int, e1: int, e2: int,
) -> float:
    """Change of cost when e2 takes the place of e1's replica on g1; trial_G is put back."""
    _recopy(trial_G, load_E, replicas_E, holder_ER, g1, e1, e2)
    change = _square_over(trial_G[g1], speed_G[g1]) - _square_over(load_G[g1], speed_G[g1])
    trial_G[g1] = load_G[g1]
    for which in range(2):
        e = e1 if which == 0 else e2
        if e >= 0:
            for r in range(replicas_E[e]):
                g = holder_ER[e, r]
                # What was counted already equals load_G again and adds nothing.
                change += (
                    _square_over(trial_G[g], speed_G[g]) - _square_over(load_G[g], speed_G[g])
                )
                trial_G[g] = load_G[g]
    return change


@compiled_inline
def _change_places(
    space: SearchSpace, placed: _Placed, load_E: Any, g1: int, c1: int, g2: int, c2: int
) -> None:
    """Exchange two slots' contents."""
    e1, e2 = placed.slots_GC[g1, c1], placed.slots_GC[g2, c2]
    gain = load_E[e1] / placed.replicas_E[e1]
    growth = -space.size_E[e1]
    _rehold(placed, e1, g1, g2)
    if e2 >= 0:
        gain -= load_E[e2] / placed.replicas_E[e2]
        growth += space.size_E[e2]
        _rehold(placed, e2, g2, g1)
    placed.slots_GC[g1, c1], placed.slots_GC[g2, c2] = e2, e1
    placed.room_G[g1] -= growth
    placed.room_G[g2] += growth
    placed.load_G[g1] -= gain
    placed.load_G[g2] += gain
    placed.trial_G[g1], placed.trial_G[g2] = placed.load_G[g1], placed.load_G[g2]


@compiled_inline
def _change_copies(
    space: SearchSpace, placed: _Placed, load_E: Any, g1: int, c1: int, e2: int
) -> None:
    """Slot (g1, c1) turns to e2."""
    e1 = placed.slots_GC[g1, c1]
    _recopy(placed.trial_G, load_E, placed.replicas_E, placed.holder_ER, g1, e1, e2)
    placed.load_G[:] = placed.trial_G
    placed.slots_GC[g1, c1] = e2
    placed.room_G[g1] -= space.size_E[e2]
    if e1 >= 0:
        placed.room_G[g1] += space.size_E[e1]
        _rehold(placed, e1, g1, -1)
    placed.holder_ER[e2, placed.replicas_E[e2]] = g1
    placed.replicas_E[e2] += 1
    placed.held_EG[e2, g1] = True


@compiled_inline
def _rehold(placed: _Placed, e: int, source: int, to: int) -> None:
    """Expert e's replica on `source` goes to device `to`, or away (-1)."""
    last = placed.replicas_E[e] - 1
    for r in range(last + 1):
        if placed.holder_ER[e, r] == source:
            if to >= 0:
                placed.holder_ER[e, r] = to
            else:
                placed.holder_ER[e, r] = placed.holder_ER[e, last]
                placed.holder_ER[e, last] = -1
                placed.replicas_E[e] = last
            break
    placed.held_EG[e, source] = False
    if to >= 0:
        placed.held_EG[e, to] = True


@compiled
def _anneal(
    space: SearchSpace, slots_GC: Any, load_E: Any, moves: int, hot: float, cold: float,
    state: RandomState,
) -> Any:
    placed = _placed(space, slots_GC.copy(), load_E)
    # Plain arrays: looking into a tuple costs more than the move itself.
    slots_GC, replicas_E, holder_ER, held_EG, load_G, trial_G, room_G = placed
    slots_G, speed_G, size_E = space.slots_G, space.speed_G, space.size_E
    devices, experts = len(slots_GC), len(load_E)
    limited = len(space.standing_EG) > 0
    moved, more = moves_price(space, slots_GC), 0.0
    hottest = _hottest(load_G, speed_G)
    best_peak = load_G[hottest] / speed_G[hottest]
    best_GC = slots_GC.copy()
    cooling = (cold / hot) ** (1.0 / max(moves - 1, 1))
    temperature = hot
    for move in range(moves):
        if best_peak <= 1.0 + ENOUGH:
            break
        temperature *= cooling
        # Every other move starts at the hottest device: nothing else lowers the peak.
        g1 = hottest if move & 1 else next_below(state, devices)
        if slots_G[g1] == 0:
            continue
        c1 = next_below(state, slots_G[g1])
        e1 = slots_GC[g1, c1]
        allowed = -temperature * np.log(1.0 - next_random(state))
        g2, c2 = -1, -1
        if e1 >= 0 and (replicas_E[e1] == 1 or next_random(state) < 0.7):
            g2 = next_below(state, devices)
            if slots_G[g2] == 0:
                continue
            c2 = next_below(state, slots_G[g2])
            e2 = int(slots_GC[g2, c2])
        else:
            e2 = int(next_below(state, experts))
        if not _legal(held_EG, room_G, size_E, g1, e1, g2, e2):
            continue
        if limited:
            more = moves_price_change(space, g1, g2, e1, e2)
            if more > 0.0 and moved + more > space.move_budget:
                continue
        if g2 >= 0:
            change = _swap_change(load_G, speed_G, load_E, replicas_E, g1, e1, g2, e2)
        else:
            change = _recopy_change(
                trial_G, load_G, speed_G, load_E, replicas_E, holder_ER, g1, e1, e2
            )
        if change > allowed:
            continue
        if g2 >= 0:
            _change_places(space, placed, load_E, g1, c1, g2, c2)
        else:
            _change_copies(space, placed, load_E, g1, c1, e2)
        moved += more
        hottest = _hottest(load_G, speed_G)
        peak = load_G[hottest] / speed_G[hottest]
        if peak < best_peak:
            best_peak = peak
            best_GC[:] = slots_GC
    return best_GC


@compiled
def _descend(space: SearchSpace, slots_GC: Any, load_E: Any) -> Any:
    """Take the move with most gain per price, again and again, while one helps and fits.

    Looked at: exchanges with the hottest device; other replicas in place of its own redundant ones;
    and one more replica, anywhere, of each of its experts. Ties go to the move looked at first.
    """
    placed = _placed(space, slots_GC.copy(), load_E)
    moved = moves_price(space, placed.slots_GC)
    for _ in range(4 * slots_GC.size):
        rate, g1, c1, g2, c2, e2 = _best_move(space, placed, load_E, moved)
        if rate < LEAST_RATE:
            break
        moved += moves_price_change(space, g1, g2, placed.slots_GC[g1, c1], e2)
        if g2 >= 0:
            _change_places(space, placed, load_E, g1, c1, g2, c2)
        else:
            _change_copies(space, placed, load_E, g1, c1, e2)
    return placed.slots_GC


@compiled
def _best_move(space: SearchSpace, placed: _Placed, load_E: Any, moved: float) -> Any:
    """(gain per price, g1, c1, g2, c2, e2) of the best move around the hottest device."""
    devices, experts = len(space.slots_G), len(load_E)
    h = _hottest(placed.load_G, space.speed_G)
    best = (0.0, -1, -1, -1, -1, -1)
    for c in range(space.slots_G[h]):
        e = int(placed.slots_GC[h, c])
        if e < 0:
            continue
        for g in range(devices):
            for d in range(space.slots_G[g]):
                f = int(placed.slots_GC[g, d])
                rate = _rate(space, placed, load_E, moved, h, e, g, f)
                if rate > best[0]:
                    best = (rate, h, c, g, d, f)
                if f < 0 or placed.replicas_E[f] > 1:
                    rate = _rate(space, placed, load_E, moved, g, f, -1, e)
                    if rate > best[0]:
                        best = (rate, g, d, -1, -1, e)
        if placed.replicas_E[e] > 1:
            for f in range(experts):
                rate = _rate(space, placed, load_E, moved, h, e, -1, f)
                if rate > best[0]:
                    best = (rate, h, c, -1, -1, f)
    return best


@compiled
def _rate(
    space: SearchSpace, placed: _Placed, load_E: Any, moved: float, g1: int, e1: int, g2: int,
    e2: int,
) -> float:
    """Gain per price of a move; 0 where it is not legal or does not fit the budget."""
    if not _legal(placed.held_EG, placed.room_G, space.size_E, g1, e1, g2, e2):
        return 0.0
    more = moves_price_change(space, g1, g2, e1, e2)
    if more > 0.0 and moved + more > space.move_budget:
        return 0.0
    if g2 >= 0:
        change = _swap_change(
            placed.load_G, space.speed_G, load_E, placed.replicas_E, g1, e1, g2, e2
        )
    else:
        change = _recopy_change(
            placed.trial_G, placed.load_G, space.speed_G, load_E, placed.replicas_E,
            placed.holder_ER, g1, e1, e2,
        )
    return -change / max(more, FREE)


FREE = 1e-6          # price of a move that costs nothing: taken first
LEAST_RATE = 1e-12   # squared overload per price below which nothing is gained
