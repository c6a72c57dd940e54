"""The one annealing loop: slots of one layer are changed at random while an objective cools.

A move turns one slot to another expert, or exchanges two slots. What it is worth is a weighted sum
over samples of traffic, which an objective computes: each is a NamedTuple of arrays with a body for
each of the five functions below (`begin` .. `most_loaded`), and numba compiles one loop for each.

  1. propose a move, often at the most loaded device of one of the dearest samples;
  2. pass over it unless it is legal: no expert twice on a device, none lost, slots, bytes, and the
     budget of moves away from the current placement;
  3. draw what the result may cost: the present cost, and a little more by chance and temperature;
  4. make the move, and add up its samples' costs, dearest first, until they exceed that;
  5. keep the move, or take it back; cool.

Always true between moves: `held` tells the slots of every expert and the bytes left on every
device; `cost` is the sum of `cost_W` and the price of token transfers; `moved` is what the way from
the current placement costs.

Knows slots, legality, the price of moves and of token transfers. Knows nothing of tokens per
device: that is the objectives' part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import (
    RandomState,
    clock,
    compiled,
    compiled_generic,
    compiled_part,
    compiled_part_inline,
    next_below,
    next_random,
)
from ...cost.token_transfers import TransferModel, all_prices, price_change

REORDERED = 32      # accepted moves after which samples are sorted by cost again
FREE = 1e-6         # price, in a descent, of a move that costs nothing: taken first
LEAST_RATE = 1e-12  # gain per price below which a descent ends


class SearchSpace(NamedTuple):
    """Devices of one layer, and how far a search may go from the current placement.

    current_EG [E, G] bool marks what is held today; sending expert e to a device that does not
    hold it costs move_price_E[e], and all moves together at most move_budget. Shape (0, 0): moves
    are free.
    """

    slots_G: Any      # [G] int64
    speed_G: Any      # [G] float64
    size_E: Any       # [E] float64 bytes of an expert; 0 where memory does not limit
    capacity_G: Any       # [G] float64 bytes for this layer; a huge number where it does not limit
    current_EG: Any
    move_price_E: Any
    move_budget: float


class Schedule(NamedTuple):
    """`moves` tried while the temperature falls geometrically from `hot` to `cold`.

    deadline: time.time() after which no further move is tried.
    """

    moves: int
    hot: float
    cold: float
    deadline: float = np.inf


class Moves(NamedTuple):
    """What an objective's moves are like: shares of the random choices, and when to give up."""

    aimed: float            # begin at the most loaded device of one of the dearest samples
    dearest: int            # so many samples
    exchanged: float        # of replicas' slots: exchanged with another slot
    dropped: float = 0.0    # of replicas' slots: become empty; the rest turn to another expert
    grown: float = 0.0      # before all that: the expert gets a replica in another slot
    probe: int = 0          # samples after which a move that lost more than it may is given up
    margin: float = 0.0     # what it may have lost by then, in addition
    enough: float = 0.0     # cost with which the search is content


class Overload(NamedTuple):
    """Cost of a sample whose most loaded device is at `peak`: over + bend · over².

    over = max(0, peak − free). free = 1 asks for perfect balance; 1 + slack leaves that much to
    other aims.
    """

    bend: float
    free: float


@dataclass(frozen=True)
class Found:
    """What a search returns: the best placement seen, its cost, and the last one."""

    cost: float
    best_GC: SlotArray
    last_GC: SlotArray


class Held(NamedTuple):
    """Who holds what."""

    expert_S: Any     # [S] int64 expert of each slot, -1 = empty
    slot_ER: Any      # [E, most] int64 slots of each expert, any order
    replicas_E: Any   # [E] int64
    device_S: Any     # [S] int64
    start_G: Any      # [G + 1] int64 first slot of each device
    free_G: Any       # [G] float64 bytes left


class Change(NamedTuple):
    """Slot s1 on device g1 turns from e1 to e2, and s2 on g2 (if any) from e2 to e1; -1 = none."""

    s1: int
    g1: int
    e1: int
    s2: int
    g2: int
    e2: int


# ---- what an objective computes ------------------------------------------------------------------


@compiled_generic
def begin(objective: Any, held: Held, cost_W: Any) -> None:
    """Count all samples from nothing; cost_W gets what each costs."""


@compiled_generic
def prepare(objective: Any, held: Held, change: Change) -> None:
    """Whatever is the same for all samples of a change that `held` has already made."""


@compiled_generic
def try_sample(objective: Any, held: Held, change: Change, w: int) -> float:
    """Cost of sample w after the change."""
    raise NotImplementedError


@compiled_generic
def commit(objective: Any, held: Held, change: Change) -> None:
    """Let the change be: all samples have been tried with it."""


@compiled_generic
def most_loaded(objective: Any, held: Held, w: int) -> int:
    """Device that keeps sample w from costing less."""
    raise NotImplementedError


@compiled_part_inline
def overload_cost(overload: Overload, peak: float) -> float:
    """What most objectives make of a sample's peak (1 = perfect balance)."""
    over = max(peak - overload.free, 0.0)
    return over + overload.bend * over * over


@compiled_part_inline
def copy_values(source_X: Any, to_X: Any) -> None:
    """to_X[:] = source_X for vectors, which takes the compiler a hundredth of the time."""
    for i in range(len(to_X)):
        to_X[i] = source_X[i]


@compiled_part_inline
def copy_rows(source_WX: Any, to_WX: Any) -> None:
    """The same for matrices."""
    for w in range(to_WX.shape[0]):
        for i in range(to_WX.shape[1]):
            to_WX[w, i] = source_WX[w, i]


# ---- the search ---------------------------------------------------------------------------------


def search_space(
    slots_G: npt.NDArray[np.int64],
    speed_G: FloatArray,
    experts: int,
    size_E: FloatArray | None = None,
    capacity_G: FloatArray | None = None,
    *,
    current_GC: SlotArray | None = None,
    move_price_E: FloatArray | None = None,
    move_budget: float = 0.0,
) -> SearchSpace:
    """The space; memory and moves left out where they do not limit."""
    current_EG = np.zeros((0, 0), np.bool_)
    if current_GC is not None:
        current_EG = np.zeros((experts, len(slots_G)), np.bool_)
        device, slot = np.nonzero(current_GC >= 0)
        current_EG[current_GC[device, slot], device] = True
    limited = size_E is not None and capacity_G is not None
    return SearchSpace(
        np.asarray(slots_G, np.int64),
        np.asarray(speed_G, np.float64),
        np.asarray(size_E, np.float64) if limited else np.zeros(experts),
        np.asarray(capacity_G, np.float64) if limited else np.full(len(slots_G), 1e300),
        current_EG,
        np.ones(experts) if move_price_E is None else np.asarray(move_price_E, np.float64),
        float(move_budget),
    )


def anneal(
    space: SearchSpace,
    objective: Any,
    weight_W: FloatArray,
    slots_GC: SlotArray,
    moves: Moves,
    schedule: Schedule,
    transfers: TransferModel,
    state: RandomState,
    *,
    descend: bool = False,
) -> Found:
    """Search from these slots [G, C]; samples count with weight_W.

    descend: first take the best moves one by one, by gain per price: where a budget of moves is
    small, chance would spend it on others.
    """
    require_slots(space, slots_GC)
    weight_W = np.asarray(weight_W, np.float64)
    slots_G = np.asarray(space.slots_G)
    filled_GC = np.arange(slots_GC.shape[1]) < slots_G[:, None]
    held = _hold(space, slots_GC[filled_GC].astype(np.int64))
    if descend:
        _descend(space, objective, held, weight_W, schedule.deadline)
    cost, best_S = _anneal(
        space, objective, held, weight_W, moves, schedule, transfers, state
    )
    found = []
    for expert_S in (best_S, held.expert_S):
        found_GC = np.full(slots_GC.shape, -1, np.int16)
        found_GC[filled_GC] = expert_S
        found.append(found_GC)
    return Found(float(cost), found[0], found[1])


def require_slots(space: SearchSpace, slots_GC: SlotArray) -> None:
    """Every search's first line: compiled loops index without looking.

    Slots [G, C] of at least the widest device's width, and nothing beyond a device's own slots.
    Raises AssertionError: callers bring current plans into this form (`within_slots`).
    """
    devices, width = slots_GC.shape
    slots_G = np.asarray(space.slots_G)
    assert devices == len(slots_G), f"{devices} rows of slots for {len(slots_G)} devices"
    assert width >= slots_G.max(), f"{width} slots wide, a device has {slots_G.max()}"
    beyond = (slots_GC >= 0) & (np.arange(width) >= slots_G[:, None])
    assert not beyond.any(), f"device {np.argwhere(beyond)[0][0]} holds more than its slots"


def _hold(space: SearchSpace, expert_S: npt.NDArray[np.int64]) -> Held:
    slots_G, experts = np.asarray(space.slots_G), len(space.size_E)
    device_S = np.repeat(np.arange(len(slots_G)), slots_G)
    used_S = np.flatnonzero(expert_S >= 0)
    order_R = used_S[np.argsort(expert_S[used_S], kind="stable")]
    replicas_E = np.bincount(expert_S[used_S], minlength=experts)
    most = max(min(len(slots_G), len(expert_S) - experts + 1), int(replicas_E.max(initial=1)))
    slot_ER = np.full((experts, most), -1, np.int64)
    slot_ER[np.arange(most) < replicas_E[:, None]] = order_R
    free_G = space.capacity_G - np.bincount(
        device_S[used_S], space.size_E[expert_S[used_S]], len(slots_G)
    )
    start_G = np.concatenate(([0], np.cumsum(slots_G)))
    return Held(expert_S, slot_ER, replicas_E, device_S, start_G, free_G)


@compiled_part_inline
def past(deadline: float) -> bool:
    """Whether the time is up; without a limit the clock is not looked at."""
    return deadline < np.inf and clock() > deadline


@compiled
def _anneal(
    space: SearchSpace, objective: Any, held: Held, weight_W: Any, moves: Moves,
    schedule: Schedule, transfers: TransferModel, state: RandomState,
) -> Any:
    """(least cost, its experts by slot); `held` ends where the search does."""
    samples = len(weight_W)
    cost_W, tried_W = np.zeros(samples), np.zeros(samples)
    begin(objective, held, cost_W)
    for w in range(samples):
        cost_W[w] *= weight_W[w]
    order_W = _by_cost(cost_W)
    destinations_E = _all_destinations(held, transfers)
    price_T = all_prices(transfers, destinations_E)
    priced = len(price_T) > 0
    cost = cost_W.sum() + (transfers.weight * price_T.mean() if priced else 0.0)
    best_cost, best_S = cost, held.expert_S.copy()
    moved, accepted = moves_price(space, held), 0
    cooling = (schedule.cold / schedule.hot) ** (1.0 / max(schedule.moves - 1, 1))
    temperature = schedule.hot
    for _ in range(schedule.moves):
        if best_cost <= moves.enough or past(schedule.deadline):
            break
        temperature *= cooling
        change = _propose(objective, held, moves, order_W, state)
        if not _legal(space, held, change):
            continue
        more_moved = _more_moved(space, change)
        if more_moved > 0.0 and moved + more_moved > space.move_budget:
            continue
        allowed = cost - temperature * np.log(1.0 - next_random(state))
        _make(held, change)
        prepare(objective, held, change)
        total = cost - cost_W.sum()
        bits1, bits2 = 0, 0
        if priced:
            bits1 = _destinations(held, transfers, change.e1)
            bits2 = _destinations(held, transfers, change.e2)
            total += price_change(
                transfers, destinations_E, price_T, change.e1, bits1, change.e2, bits2, False
            )
        lost, weighed = 0.0, 0.0
        for i in range(samples):
            if total > allowed:
                break
            if i == moves.probe and i > 0 and lost > (allowed - cost + moves.margin) * weighed:
                total = np.inf
                break
            w = order_W[i]
            tried_W[w] = weight_W[w] * try_sample(objective, held, change, w)
            total += tried_W[w]
            lost += tried_W[w] - cost_W[w]
            weighed += weight_W[w]
        if total > allowed:
            _take_back(held, change)
            continue
        _commit(space, objective, held, change)
        if priced:
            price_change(
                transfers, destinations_E, price_T, change.e1, bits1, change.e2, bits2, True
            )
        moved += more_moved
        copy_values(tried_W, cost_W)
        cost = total
        accepted += 1
        if cost < best_cost:
            best_cost = cost
            copy_values(held.expert_S, best_S)
        if accepted % REORDERED == 0:
            order_W = _by_cost(cost_W)
    return best_cost, best_S


@compiled
def _descend(
    space: SearchSpace, objective: Any, held: Held, weight_W: Any, deadline: float
) -> None:
    """Take the move with most gain per price, again and again, while one helps and fits.

    Looked at: for the experts of the most loaded device of the dearest sample, an exchange with any
    slot, a replica in any slot, and another expert in place of their own replica.
    """
    cost_W, moved = np.zeros(len(weight_W)), moves_price(space, held)
    begin(objective, held, cost_W)
    cost = (weight_W * cost_W).sum()
    for _ in range(4 * len(held.expert_S)):
        rate, best = LEAST_RATE, Change(-1, -1, -1, -1, -1, -1)
        g1 = most_loaded(objective, held, _by_cost(weight_W * cost_W)[0])
        for s1 in range(held.start_G[g1], held.start_G[g1 + 1]):
            e1 = held.expert_S[s1]
            if e1 < 0:
                continue
            if past(deadline):
                return
            for s2 in range(len(held.expert_S)):
                g2, e2 = held.device_S[s2], held.expert_S[s2]
                for change in (Change(s1, g1, e1, s2, g2, e2), Change(s2, g2, e2, -1, -1, e1)):
                    gain = _rate(space, objective, held, weight_W, change, cost, moved)
                    if gain > rate:
                        rate, best = gain, change
            if held.replicas_E[e1] > 1:
                for e2 in range(len(held.replicas_E)):
                    change = Change(s1, g1, e1, -1, -1, e2)
                    gain = _rate(space, objective, held, weight_W, change, cost, moved)
                    if gain > rate:
                        rate, best = gain, change
        if best.s1 < 0:
            return
        moved += _more_moved(space, best)
        _make(held, best)
        prepare(objective, held, best)
        cost = 0.0
        for w in range(len(weight_W)):
            cost_W[w] = try_sample(objective, held, best, w)
            cost += weight_W[w] * cost_W[w]
        _commit(space, objective, held, best)


@compiled_part
def _rate(
    space: SearchSpace, objective: Any, held: Held, weight_W: Any, change: Change, cost: float,
    moved: float,
) -> float:
    """Gain per price of a move; 0 where it is not legal or breaks the budget."""
    if not _legal(space, held, change):
        return 0.0
    more_moved = _more_moved(space, change)
    if more_moved > 0.0 and moved + more_moved > space.move_budget:
        return 0.0
    _make(held, change)
    prepare(objective, held, change)
    for w in range(len(weight_W)):
        cost -= weight_W[w] * try_sample(objective, held, change, w)
    _take_back(held, change)
    return cost / max(more_moved, FREE)


@compiled_part_inline
def _take_back(held: Held, change: Change) -> None:
    _make(held, Change(change.s1, change.g1, change.e2, change.s2, change.g2, change.e1))


@compiled_part_inline
def _commit(space: SearchSpace, objective: Any, held: Held, change: Change) -> None:
    """Let a move that is made and tried be."""
    commit(objective, held, change)
    growth = _growth(space, change)
    held.free_G[change.g1] -= growth
    if change.g2 >= 0:
        held.free_G[change.g2] += growth


@compiled
def _by_cost(cost_W: Any) -> Any:
    """Samples, dearest first."""
    return np.argsort(-cost_W)


@compiled_part_inline
def _propose(
    objective: Any, held: Held, moves: Moves, order_W: Any, state: RandomState
) -> Change:
    """A move, legal or not; s1 = -1 where a device without slots was drawn."""
    devices = len(held.start_G) - 1
    g1, g2, s2 = -1, -1, -1
    if moves.aimed > 0.0:
        w = order_W[next_below(state, min(len(order_W), moves.dearest))]
        if next_random(state) < moves.aimed:
            g1 = most_loaded(objective, held, w)
    if g1 < 0:
        g1 = next_below(state, devices)
    s1 = _any_slot(held, g1, state)
    if s1 < 0:
        return Change(s1, g1, -1, s2, g2, -1)
    e1 = held.expert_S[s1]
    if e1 < 0:
        return Change(s1, g1, e1, s2, g2, next_below(state, len(held.replicas_E)))
    grows = moves.grown > 0.0 and next_random(state) < moves.grown
    kind = 0.0
    if not grows and held.replicas_E[e1] > 1:
        kind = next_random(state)
    if kind < moves.exchanged:
        g2 = next_below(state, devices)
        s2 = _any_slot(held, g2, state)
        e2 = held.expert_S[s2] if s2 >= 0 else e1
        if grows:
            return Change(s2, g2, e2, -1, -1, e1)
        return Change(s1, g1, e1, s2, g2, e2)
    if kind < moves.exchanged + moves.dropped:
        return Change(s1, g1, e1, s2, g2, -1)
    return Change(s1, g1, e1, s2, g2, next_below(state, len(held.replicas_E)))


@compiled_part_inline
def _any_slot(held: Held, g: int, state: RandomState) -> int:
    """A slot of device g; -1 where it has none."""
    first, last = held.start_G[g], held.start_G[g + 1]
    return first + next_below(state, last - first) if last > first else -1


@compiled_part_inline
def _legal(space: SearchSpace, held: Held, change: Change) -> bool:
    """Whether no expert is lost or twice on a device, and memory holds what comes."""
    if change.s1 < 0 or change.e1 == change.e2 or change.g1 == change.g2:
        return False
    growth = _growth(space, change)
    if growth > held.free_G[change.g1] or holds(held, change.e2, change.g1):
        return False
    if change.s2 >= 0:
        return -growth <= held.free_G[change.g2] and not holds(held, change.e1, change.g2)
    if change.e1 >= 0 and held.replicas_E[change.e1] == 1:
        return False
    return change.e2 < 0 or held.replicas_E[change.e2] < held.slot_ER.shape[1]


@compiled_part_inline
def holds(held: Held, e: int, g: int) -> bool:
    """Whether device g holds expert e; nobody holds -1."""
    if e >= 0:
        for r in range(held.replicas_E[e]):
            if held.device_S[held.slot_ER[e, r]] == g:
                return True
    return False


@compiled_part_inline
def _growth(space: SearchSpace, change: Change) -> float:
    """Bytes that device g1 gains, and g2 loses."""
    growth = space.size_E[change.e2] if change.e2 >= 0 else 0.0
    return growth - (space.size_E[change.e1] if change.e1 >= 0 else 0.0)


@compiled_part_inline
def _make(held: Held, change: Change) -> None:
    """Carry the change out on slots."""
    held.expert_S[change.s1] = change.e2
    if change.s2 >= 0:
        held.expert_S[change.s2] = change.e1
    if change.e1 >= 0:
        _replace_slot(held, change.e1, change.s1, change.s2)
    if change.e2 >= 0:
        _replace_slot(held, change.e2, change.s2, change.s1)


@compiled_part_inline
def _replace_slot(held: Held, e: int, old: int, new: int) -> None:
    """Expert e's slot `old` gives way to `new`; old < 0 adds a replica, new < 0 removes one."""
    slot_R, last = held.slot_ER[e], held.replicas_E[e] - 1
    if old < 0:
        slot_R[last + 1] = new
        held.replicas_E[e] = last + 2
        return
    r = 0
    while slot_R[r] != old:
        r += 1
    if new < 0:
        new = slot_R[last]
        held.replicas_E[e] = last
    slot_R[r] = new


@compiled_part
def moves_price(space: SearchSpace, held: Held) -> float:
    """What it costs to get from the current placement to these slots."""
    price = 0.0
    if space.current_EG.shape[0] > 0:
        for s in range(len(held.expert_S)):
            e = held.expert_S[s]
            if e >= 0 and not space.current_EG[e, held.device_S[s]]:
                price += space.move_price_E[e]
    return price


@compiled_part_inline
def _more_moved(space: SearchSpace, change: Change) -> float:
    """What the change adds to that."""
    more = 0.0
    if space.current_EG.shape[0] > 0:
        for e, g, to in (
            (change.e1, change.g1, change.g2), (change.e2, change.g2, change.g1)
        ):
            if e >= 0:
                if g >= 0 and not space.current_EG[e, g]:
                    more -= space.move_price_E[e]
                if to >= 0 and not space.current_EG[e, to]:
                    more += space.move_price_E[e]
    return more


@compiled_part
def _destinations(held: Held, transfers: TransferModel, e: int) -> int:
    """Bit set of the destinations of expert e; 0 for none."""
    destinations = 0
    if e >= 0:
        for r in range(held.replicas_E[e]):
            destinations |= 1 << transfers.destination_G[held.device_S[held.slot_ER[e, r]]]
    return destinations


@compiled
def _all_destinations(held: Held, transfers: TransferModel) -> Any:
    """[E] destinations of every expert; zeros where transfers cost nothing."""
    destinations_E = np.zeros(len(held.replicas_E), np.int64)
    if len(transfers.home_T) > 0:
        for e in range(len(destinations_E)):
            destinations_E[e] = _destinations(held, transfers, e)
    return destinations_E
