"""The compiled loops of `search_time.py`: steps as device times, and annealing on their mean.

Every step keeps its split: tokens and microseconds of each slot, sums of both for each device. A
move takes the touched experts' tokens off and puts them back by the dispatch's own rule; weights
are read by every copy that gets a token. Knows numbers only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .annealing import Annealing, SearchSpace, moves_price_change
from .compiled import RandomState, compiled, next_below, next_random

FLAT, ALIKE, ONE = 0, 1, 2      # copies level their devices; share alike; one copy takes all
HAND_ON_ROUNDS = 4              # of the fullest device refilling its replicated experts, per trial
FLAT_ENOUGH = 1e-3              # above perfect balance of tokens: no rounds below this
PROBED = 12                     # steps after which a move that lost so far is given up
PROBE_MARGIN = 3e-3             # what it may have lost by then, in units of the reference


class DeviceTimes(NamedTuple):
    """What a device's step takes: start + sum over its copies with tokens, over its speed.

    A copy of expert e takes read_us_E[e] + tokens · token_us, or by its whole tokens what
    table_us lists, where that is not empty. link_us: of the exchanges, per token of the device with
    most. gather_us: paid where any expert has replicas. rule: how copies share tokens.
    reference_us: the microseconds that count as 1.
    """

    start_us: float
    read_us_E: Any
    token_us: float
    table_us: Any
    link_us: float
    gather_us: float
    rule: int
    reference_us: float


@compiled
def _slot_us(times: DeviceTimes, e: int, tokens: float) -> float:
    """One copy's time. Below one token, that share of what one token takes: tokens are whole."""
    if tokens <= 0.0:
        return 0.0
    whole = max(tokens, 1.0)
    if len(times.table_us) > 0:
        low = min(int(whole), len(times.table_us) - 2)
        us = times.table_us[low] + (whole - low) * (times.table_us[low + 1] - times.table_us[low])
    else:
        us = times.read_us_E[e] + whole * times.token_us
    return float(us * min(tokens, 1.0))


@compiled
def _put(
    times: DeviceTimes, e: int, s: int, tokens: float, device_S: Any, tokens_G: Any, us_G: Any,
    tokens_S: Any, us_S: Any,
) -> None:
    us = _slot_us(times, e, tokens)
    tokens_S[s], us_S[s] = tokens, us
    tokens_G[device_S[s]] += tokens
    us_G[device_S[s]] += us


@compiled
def _lift(s: int, device_S: Any, tokens_G: Any, us_G: Any, tokens_S: Any, us_S: Any) -> None:
    """Take what a slot computes off its device."""
    tokens_G[device_S[s]] -= tokens_S[s]
    us_G[device_S[s]] -= us_S[s]
    tokens_S[s], us_S[s] = 0.0, 0.0


@compiled
def _fill(
    times: DeviceTimes, e: int, tokens: float, slot_R: Any, copies: int, device_S: Any,
    speed_G: Any, tokens_G: Any, us_G: Any, tokens_S: Any, us_S: Any,
) -> None:
    """Put one expert's tokens on its copies, as the dispatch would."""
    if copies == 1 or times.rule == ALIKE:
        for r in range(copies):
            _put(times, e, slot_R[r], tokens / copies, device_S, tokens_G, us_G, tokens_S, us_S)
        return
    if times.rule == ONE:
        best, least = slot_R[0], np.inf
        for r in range(copies):
            g = device_S[slot_R[r]]
            level = (us_G[g] + times.read_us_E[e]) / speed_G[g]
            if level < least:
                best, least = slot_R[r], level
        _put(times, e, best, tokens, device_S, tokens_G, us_G, tokens_S, us_S)
        return
    level_R = np.empty(copies)
    for r in range(copies):
        g = device_S[slot_R[r]]
        level_R[r] = tokens_G[g] / speed_G[g]
    order = np.argsort(level_R)
    below, speed, level = tokens, 0.0, 0.0
    for i in range(copies):
        if i > 0 and level_R[order[i]] >= level:
            break
        g = device_S[slot_R[order[i]]]
        below += tokens_G[g]
        speed += speed_G[g]
        level = below / speed
    for r in range(copies):
        g = device_S[slot_R[r]]
        share = max(0.0, level * speed_G[g] - tokens_G[g])
        _put(times, e, slot_R[r], share, device_S, tokens_G, us_G, tokens_S, us_S)


@compiled
def _hand_on(
    times: DeviceTimes, load_E: Any, expert_S: Any, slot_ER: Any, copies_E: Any, device_S: Any,
    start_G: Any, speed_G: Any, tokens_G: Any, us_G: Any, tokens_S: Any, us_S: Any, rounds: int,
) -> None:
    """Let the device with most tokens (over speed) refill its replicated experts, several times."""
    ideal = tokens_G.sum() / speed_G.sum()
    before = np.inf
    for _ in range(rounds):
        fullest = int(np.argmax(tokens_G / speed_G))
        level = tokens_G[fullest] / speed_G[fullest]
        if level <= ideal * (1.0 + FLAT_ENOUGH) or level > before * (1.0 - 1e-5):
            return
        before = level
        for s in range(start_G[fullest], start_G[fullest + 1]):
            e = expert_S[s]
            if e >= 0 and copies_E[e] > 1 and tokens_S[s] > 0.0:
                for r in range(copies_E[e]):
                    _lift(slot_ER[e, r], device_S, tokens_G, us_G, tokens_S, us_S)
                _fill(times, e, load_E[e], slot_ER[e], copies_E[e], device_S, speed_G, tokens_G,
                      us_G, tokens_S, us_S)


@compiled
def _step_cost(times: DeviceTimes, speed_G: Any, tokens_G: Any, us_G: Any) -> Any:
    """(cost of the step, its slowest device)."""
    slowest, longest, most = 0, 0.0, 0.0
    for g in range(len(speed_G)):
        if tokens_G[g] < 1e-9:
            continue
        us = (us_G[g] + times.start_us * min(tokens_G[g], 1.0)) / speed_G[g]
        most = max(most, tokens_G[g])
        if us > longest:
            slowest, longest = g, us
    return (longest + times.link_us * most) / times.reference_us, slowest


@compiled
def _split_afresh(
    times: DeviceTimes, load_E: Any, expert_S: Any, slot_ER: Any, copies_E: Any, device_S: Any,
    start_G: Any, speed_G: Any, tokens_G: Any, us_G: Any, tokens_S: Any, us_S: Any,
) -> None:
    """Split one step from nothing: single copies first, then replicated ones, heaviest first."""
    for turn in range(2):
        for e in np.argsort(-load_E):
            if (copies_E[e] > 1) == (turn == 1) and copies_E[e] > 0:
                _fill(times, e, load_E[e], slot_ER[e], copies_E[e], device_S, speed_G, tokens_G,
                      us_G, tokens_S, us_S)
    if times.rule == FLAT:
        _hand_on(times, load_E, expert_S, slot_ER, copies_E, device_S, start_G, speed_G, tokens_G,
                 us_G, tokens_S, us_S, 8 * HAND_ON_ROUNDS)


@compiled
def _holds(slot_ER: Any, copies_E: Any, device_S: Any, e: int, g: int) -> bool:
    for r in range(copies_E[e]):
        if device_S[slot_ER[e, r]] == g:
            return True
    return False


@compiled
def _turn(slot_ER: Any, copies_E: Any, e: int, old: int, new: int) -> None:
    """Expert e's copy in slot `old` goes to `new`; old < 0 adds a copy, new < 0 removes one."""
    if old < 0:
        slot_ER[e, copies_E[e]] = new
        copies_E[e] += 1
        return
    last = copies_E[e] - 1
    for r in range(copies_E[e]):
        if slot_ER[e, r] == old:
            if new >= 0:
                slot_ER[e, r] = new
            else:
                slot_ER[e, r] = slot_ER[e, last]
                copies_E[e] = last
            return


@compiled
def _change(expert_S: Any, slot_ER: Any, copies_E: Any, s1: int, e1: int, s2: int, e2: int) -> None:
    """Slot s1 turns from e1 to e2, and s2 (if any) from e2 to e1; -1 = empty."""
    expert_S[s1] = e2
    if s2 >= 0:
        expert_S[s2] = e1
    if e1 >= 0:
        _turn(slot_ER, copies_E, e1, s1, s2)
    if e2 >= 0:
        _turn(slot_ER, copies_E, e2, s2, s1)


@compiled
def _propose(
    space: SearchSpace, expert_S: Any, slot_ER: Any, copies_E: Any, device_S: Any, start_G: Any,
    slowest: int, state: RandomState,
) -> Any:
    """(s1, e1, s2, e2) as for `_change`; it may break a rule.

    Begins at the slowest device of a step, seven times in ten. An expert there changes places with
    another (or an empty slot), loses this copy, or gets one more elsewhere, in an empty slot or
    instead of another's replica; an empty slot takes any expert.
    """
    g1 = slowest if next_random(state) < 0.7 else next_below(state, len(space.slots_G))
    s1 = start_G[g1] + next_below(state, start_G[g1 + 1] - start_G[g1])
    e1 = expert_S[s1]
    if e1 < 0:
        return s1, e1, -1, next_below(state, len(copies_E))
    kind = next_random(state)
    if copies_E[e1] > 1 and kind < 0.3:
        return s1, e1, -1, -1
    s2 = next_below(state, len(expert_S))
    if kind < 0.55:
        return s2, expert_S[s2], -1, e1
    return s1, e1, s2, expert_S[s2]


@compiled
def _legal(
    space: SearchSpace, slot_ER: Any, copies_E: Any, device_S: Any, room_G: Any, s1: int, e1: int,
    s2: int, e2: int,
) -> bool:
    """Whether a move keeps every expert somewhere, never twice on a device, and memory."""
    if e1 == e2:
        return False
    g1 = device_S[s1]
    growth = (space.size_E[e2] if e2 >= 0 else 0.0) - (space.size_E[e1] if e1 >= 0 else 0.0)
    if growth > room_G[g1] or (e2 >= 0 and _holds(slot_ER, copies_E, device_S, e2, g1)):
        return False
    if s2 < 0:
        if e1 >= 0 and copies_E[e1] == 1:
            return False
        return e2 < 0 or (copies_E[e2] < slot_ER.shape[1] and (e1 >= 0 or space.fill))
    g2 = device_S[s2]
    return g1 != g2 and -growth <= room_G[g2] and not (
        e1 >= 0 and _holds(slot_ER, copies_E, device_S, e1, g2)
    )


@compiled
def anneal(
    space: SearchSpace, times: DeviceTimes, load_WE: Any, weight_W: Any, expert_S: Any,
    device_S: Any, start_G: Any, moved: float, annealing: Annealing, state: RandomState,
) -> Any:
    """(best cost, best slots): mean step time over the reference, least seen.

    load_WE: tokens. A move that lost more than a margin on the first steps is given up.
    """
    steps, experts = load_WE.shape
    slots, devices = len(expert_S), len(space.speed_G)
    expert_S = expert_S.copy()
    slot_ER, copies_E = np.full((experts, devices), -1, np.int64), np.zeros(experts, np.int64)
    room_G, spare = space.room_G.copy(), 0
    for s in range(slots):
        if expert_S[s] >= 0:
            _turn(slot_ER, copies_E, expert_S[s], -1, s)
            room_G[device_S[s]] -= space.size_E[expert_S[s]]
            spare += 1 if copies_E[expert_S[s]] > 1 else 0
    tokens_WG, us_WG = np.zeros((steps, devices)), np.zeros((steps, devices))
    tokens_WS, us_WS = np.zeros((steps, slots)), np.zeros((steps, slots))
    cost_W, slowest_W = np.zeros(steps), np.zeros(steps, np.int64)
    for w in range(steps):
        _split_afresh(times, load_WE[w], expert_S, slot_ER, copies_E, device_S, start_G,
                      space.speed_G, tokens_WG[w], us_WG[w], tokens_WS[w], us_WS[w])
        cost_W[w], slowest_W[w] = _step_cost(times, space.speed_G, tokens_WG[w], us_WG[w])
    tried_WG, tried_us_WG = tokens_WG.copy(), us_WG.copy()
    tried_WS, tried_us_WS = tokens_WS.copy(), us_WS.copy()
    tried_W, tried_slowest_W = cost_W.copy(), slowest_W.copy()
    gather = times.gather_us / times.reference_us
    cost = (weight_W * cost_W).sum() + (gather if spare > 0 else 0.0)
    best_cost, best_S = cost, expert_S.copy()
    cooling = (annealing.cold / annealing.hot) ** (1.0 / max(annealing.moves - 1, 1))
    temperature, first = annealing.hot, 0
    for _ in range(annealing.moves):
        temperature *= cooling
        slowest = slowest_W[next_below(state, steps)]
        s1, e1, s2, e2 = _propose(space, expert_S, slot_ER, copies_E, device_S, start_G, slowest,
                                  state)
        if not _legal(space, slot_ER, copies_E, device_S, room_G, s1, e1, s2, e2):
            continue
        g1, g2 = device_S[s1], (device_S[s2] if s2 >= 0 else -1)
        more_moved = moves_price_change(space, g1, g2, e1, e2)
        if more_moved > 0.0 and moved + more_moved > space.move_budget:
            continue
        change = 0 if s2 >= 0 else (1 if e2 >= 0 else 0) - (1 if e1 >= 0 else 0)
        worse = -temperature * np.log(1.0 - next_random(state))
        delta = (gather if spare + change > 0 else 0.0) - (gather if spare > 0 else 0.0)
        base, weighed = delta, 0.0
        _change(expert_S, slot_ER, copies_E, s1, e1, s2, e2)
        first = (first + 1) % steps
        given_up = False
        for i in range(steps):
            w = (first + i) % steps
            if (i == PROBED and delta - base > (worse + PROBE_MARGIN) * weighed) and steps > 24:
                given_up = True
                break
            weighed += weight_W[w]
            tried_W[w], tried_slowest_W[w] = cost_W[w], slowest_W[w]
            tried_WG[w], tried_us_WG[w] = tokens_WG[w], us_WG[w]
            tried_WS[w], tried_us_WS[w] = tokens_WS[w], us_WS[w]
            if (e1 < 0 or load_WE[w, e1] == 0.0) and (e2 < 0 or load_WE[w, e2] == 0.0):
                continue
            _lift(s1, device_S, tried_WG[w], tried_us_WG[w], tried_WS[w], tried_us_WS[w])
            for e in (e1, e2):
                for r in range(copies_E[e] if e >= 0 else 0):
                    _lift(slot_ER[e, r], device_S, tried_WG[w], tried_us_WG[w], tried_WS[w],
                          tried_us_WS[w])
            for e in (e1, e2):
                if e >= 0:
                    _fill(times, e, load_WE[w, e], slot_ER[e], copies_E[e], device_S,
                          space.speed_G, tried_WG[w], tried_us_WG[w], tried_WS[w], tried_us_WS[w])
            if times.rule == FLAT and spare + change > 0:
                _hand_on(times, load_WE[w], expert_S, slot_ER, copies_E, device_S, start_G,
                         space.speed_G, tried_WG[w], tried_us_WG[w], tried_WS[w],
                         tried_us_WS[w], HAND_ON_ROUNDS)
            tried_W[w], tried_slowest_W[w] = _step_cost(
                times, space.speed_G, tried_WG[w], tried_us_WG[w]
            )
            delta += weight_W[w] * (tried_W[w] - cost_W[w])
        if given_up or delta > worse:
            _change(expert_S, slot_ER, copies_E, s1, e2, s2, e1)
            continue
        growth = (space.size_E[e2] if e2 >= 0 else 0.0) - (space.size_E[e1] if e1 >= 0 else 0.0)
        room_G[g1] -= growth
        if s2 >= 0:
            room_G[g2] += growth
        moved += more_moved
        spare += change
        tokens_WG, tried_WG = tried_WG, tokens_WG
        us_WG, tried_us_WG = tried_us_WG, us_WG
        tokens_WS, tried_WS = tried_WS, tokens_WS
        us_WS, tried_us_WS = tried_us_WS, us_WS
        cost_W, tried_W = tried_W, cost_W
        slowest_W, tried_slowest_W = tried_slowest_W, slowest_W
        cost += delta
        if cost < best_cost - 1e-12:
            best_cost = cost
            best_S[:] = expert_S
    return best_cost, best_S
