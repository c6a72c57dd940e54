"""A step as the times of its devices, kept up to date while replicas move: for `anneal_time.py`.

Every step keeps its split: tokens and microseconds of each slot, sums of both for each device. A
move takes the touched experts' tokens off and puts them back by the dispatch's own rule; weights
are read by every replica that gets a token. Knows numbers only, one layer and one step at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ....foundation.compiled import compiled

FLAT, ALIKE, ONE = 0, 1, 2      # replicas level their devices; share alike; one takes all tokens,
                                # where the fewest experts are active
HAND_ON_ROUNDS = 4              # of the fullest device refilling its replicated experts, per trial
FLAT_ENOUGH = 1e-3              # above perfect balance: no rounds below this


class DeviceTimes(NamedTuple):
    """What a device's step takes: start + sum over its replicas with tokens, over its speed.

    A replica of expert e takes read_us_E[e] + tokens · token_us, or by its whole tokens what
    table_us lists, where that is not empty. link_us: of the exchanges, per token of the device with
    most. gather_us: paid where any expert has replicas. rule: how replicas share tokens.
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
    """One replica's time. Below one token, that share of what one token takes: tokens are whole."""
    if tokens <= 0.0:
        return 0.0
    whole = max(tokens, 1.0)
    if len(times.table_us) > 0:
        low = min(int(whole), len(times.table_us) - 2)
        us = times.table_us[low] + (whole - low) * (times.table_us[low + 1] - times.table_us[low])
    else:
        us = times.read_us_E[e] + whole * times.token_us
    return float(us * min(tokens, 1.0))


class Layout(NamedTuple):
    """Devices and slots, and where a step's row keeps what. Axes: G devices, S slots.

    A row is [3·G + 2·S]: tokens, microseconds and active replicas of each device, then tokens and
    microseconds of each slot.
    """

    device_S: Any
    start_G: Any      # [G + 1] first slot of each device
    speed_G: Any


class Holders(NamedTuple):
    """Who holds what: the expert of each slot (-1 = none), and the slots of each expert."""

    expert_S: Any
    slot_ER: Any
    replicas_E: Any


@compiled
def _put(times: DeviceTimes, layout: Layout, e: int, s: int, tokens: float, row: Any) -> None:
    """Let a slot compute so many tokens of its expert."""
    us = _slot_us(times, e, tokens)
    devices, slots = len(layout.speed_G), len(layout.device_S)
    g = layout.device_S[s]
    row[3 * devices + s] = tokens
    row[3 * devices + slots + s] = us
    row[g] += tokens
    row[devices + g] += us
    row[2 * devices + g] += min(tokens, 1.0)


@compiled
def _lift(layout: Layout, s: int, row: Any) -> None:
    """Take what a slot computes off its device."""
    devices, slots = len(layout.speed_G), len(layout.device_S)
    g = layout.device_S[s]
    row[g] -= row[3 * devices + s]
    row[devices + g] -= row[3 * devices + slots + s]
    row[2 * devices + g] -= min(row[3 * devices + s], 1.0)
    row[3 * devices + s] = 0.0
    row[3 * devices + slots + s] = 0.0


@compiled
def _fill(
    times: DeviceTimes, layout: Layout, held: Holders, e: int, tokens: float, row: Any
) -> None:
    """Put one expert's tokens on its replicas, as the dispatch would."""
    replicas, slot_R = held.replicas_E[e], held.slot_ER[e]
    if tokens <= 0.0:
        return
    if replicas == 1 or times.rule == ALIKE:
        for r in range(replicas):
            _put(times, layout, e, slot_R[r], tokens / replicas, row)
        return
    if times.rule == ONE:
        best, least, fewest = slot_R[0], np.inf, np.inf
        for r in range(replicas):
            g = layout.device_S[slot_R[r]]
            level = np.rint(row[2 * len(layout.speed_G) + g] + 1.0) / layout.speed_G[g]
            if level < least or (level == least and row[g] / layout.speed_G[g] < fewest):
                best, least, fewest = slot_R[r], level, row[g] / layout.speed_G[g]
        _put(times, layout, e, best, tokens, row)
        return
    # FLAT: the level of all replicas' devices; those above it drop out, which lowers it.
    level = np.inf
    for _ in range(replicas):
        below, speed = tokens, 0.0
        for r in range(replicas):
            g = layout.device_S[slot_R[r]]
            if row[g] <= level * layout.speed_G[g]:
                below += row[g]
                speed += layout.speed_G[g]
        if speed == 0.0 or below >= level * speed:
            break
        level = below / speed
    for r in range(replicas):
        g = layout.device_S[slot_R[r]]
        _put(times, layout, e, slot_R[r], max(0.0, level * layout.speed_G[g] - row[g]), row)


@compiled
def _hand_on(
    times: DeviceTimes, layout: Layout, held: Holders, load_E: Any, row: Any, rounds: int
) -> None:
    """Let the fullest device refill its replicated experts, several times.

    The fullest has most tokens over speed; where one replica takes all, most active replicas.
    """
    devices = len(layout.speed_G)
    first = 2 * devices if times.rule == ONE else 0
    ideal, before = row[first : first + devices].sum() / layout.speed_G.sum(), np.inf
    for _ in range(rounds):
        fullest, level = 0, 0.0
        for g in range(devices):
            if row[first + g] > level * layout.speed_G[g]:
                fullest, level = g, row[first + g] / layout.speed_G[g]
        if level <= ideal * (1.0 + FLAT_ENOUGH) or level > before * (1.0 - 1e-5):
            return
        before = level
        for s in range(layout.start_G[fullest], layout.start_G[fullest + 1]):
            e = held.expert_S[s]
            if e >= 0 and held.replicas_E[e] > 1 and row[3 * devices + s] > 0.0:
                for r in range(held.replicas_E[e]):
                    _lift(layout, held.slot_ER[e, r], row)
                _fill(times, layout, held, e, load_E[e], row)


@compiled
def step_cost(times: DeviceTimes, layout: Layout, row: Any) -> Any:
    """(cost of the step, its slowest device)."""
    devices, slowest, longest, most = len(layout.speed_G), 0, 0.0, 0.0
    for g in range(devices):
        if row[g] < 1e-9:
            continue
        us = (row[devices + g] + times.start_us * min(row[g], 1.0)) / layout.speed_G[g]
        most = max(most, row[g])
        if us > longest:
            slowest, longest = g, us
    return (longest + times.link_us * most) / times.reference_us, slowest


@compiled
def split_afresh(
    times: DeviceTimes, layout: Layout, held: Holders, load_E: Any, row: Any
) -> None:
    """Split one step from nothing: single replicas first, then replicated ones, heaviest first."""
    order = np.argsort(-load_E)
    for turn in range(2):
        for e in order:
            if (held.replicas_E[e] > 1) == (turn == 1):
                _fill(times, layout, held, e, load_E[e], row)
    if times.rule != ALIKE:
        _hand_on(times, layout, held, load_E, row, 8 * HAND_ON_ROUNDS)


@compiled
def try_step(
    times: DeviceTimes, layout: Layout, held: Holders, load_E: Any, row: Any, s1: int, e1: int,
    e2: int, handing: bool,
) -> Any:
    """As `step_cost`, after a move: what it touched is taken off and put back."""
    _lift(layout, s1, row)
    for i in range(2):
        e = e1 if i == 0 else e2
        if e >= 0:
            for r in range(held.replicas_E[e]):
                _lift(layout, held.slot_ER[e, r], row)
    for i in range(2):
        e = e1 if i == 0 else e2
        if e >= 0:
            _fill(times, layout, held, e, load_E[e], row)
    if handing:
        _hand_on(times, layout, held, load_E, row, HAND_ON_ROUNDS)
    return step_cost(times, layout, row)
