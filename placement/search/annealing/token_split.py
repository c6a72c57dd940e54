"""How the dispatch splits one sample's tokens over replicas, kept up to date while slots change.

A sample keeps the tokens of every device and slot. A change takes the touched experts' tokens off
and pours them again; then the fullest device pours its replicated experts again, so that what it
has too much of shifts to others, until nothing gains. The result is near the best split and never
better, so a placement is never flattered.

Knows loads, speeds and who holds what; one sample at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....foundation.compiled import compiled, compiled_part
from .annealer import Change, Held

LEVEL, ALIKE, ONE = 0, 1, 2     # replicas level their devices; share alike; one takes all tokens,
                                # where the fewest experts are active
LEAST_GAIN = 1e-5               # of the ideal level, by which a round must lower the fullest


@compiled
def split_anew(
    rule: int, held: Held, speed_G: Any, load_E: Any, load_G: Any, flow_S: Any, flat: float,
    rounds: int,
) -> float:
    """Split a sample from nothing: experts without replicas first, then others, heaviest first.

    Fills load_G, flow_S; returns the highest level (see `shift`).
    """
    for g in range(len(load_G)):
        load_G[g] = 0.0
    for s in range(len(flow_S)):
        flow_S[s] = 0.0
    order_E = np.argsort(-load_E)
    for replicated in range(2):
        for e in order_E:
            if (held.replicas_E[e] > 1) == (replicated == 1):
                _pour(rule, held, speed_G, e, load_E[e], load_G, flow_S)
    return shift(rule, held, speed_G, load_E, load_G, flow_S, flat, rounds)


@compiled_part
def split_again(
    rule: int, held: Held, change: Change, speed_G: Any, load_E: Any, load_G: Any, flow_S: Any,
    flat: float, rounds: int,
) -> float:
    """The same after a change that `held` has already made, from the split before it."""
    first, second = change.e1, change.e2
    if first < 0 or (second >= 0 and held.replicas_E[second] < held.replicas_E[first]):
        first, second = second, first
    _lift(held, first, load_G, flow_S)
    if second >= 0:
        _lift(held, second, load_G, flow_S)
    for s in (change.s1, change.s2):     # what became empty is in no expert's list any more
        if s >= 0:
            load_G[held.device_S[s]] -= flow_S[s]
            flow_S[s] = 0.0
    _pour(rule, held, speed_G, first, load_E[first], load_G, flow_S)
    if second >= 0:
        _pour(rule, held, speed_G, second, load_E[second], load_G, flow_S)
    return shift(rule, held, speed_G, load_E, load_G, flow_S, flat, rounds)


@compiled_part
def shift(
    rule: int, held: Held, speed_G: Any, load_E: Any, load_G: Any, flow_S: Any, flat: float,
    rounds: int,
) -> float:
    """Let the fullest device pour its replicated experts again, so many times; its level at last.

    A level is tokens over speed (where one replica takes all tokens: active slots over speed), in
    units of perfect balance. Below 1 + flat nothing is done.
    """
    ideal = _ideal(rule, speed_G, load_G, flow_S)
    fullest = _fullest(rule, held, speed_G, load_G, flow_S)
    peak = _level(rule, held, speed_G, load_G, flow_S, fullest) / ideal
    if rule == ALIKE:
        return float(peak)
    for _ in range(rounds):
        if peak <= 1.0 + flat:
            break
        for s in range(held.start_G[fullest], held.start_G[fullest + 1]):
            e = held.expert_S[s]
            if e >= 0 and held.replicas_E[e] > 1 and flow_S[s] > 0.0:
                _lift(held, e, load_G, flow_S)
                _pour(rule, held, speed_G, e, load_E[e], load_G, flow_S)
        before = peak
        fullest = _fullest(rule, held, speed_G, load_G, flow_S)
        peak = _level(rule, held, speed_G, load_G, flow_S, fullest) / ideal
        if peak > before - LEAST_GAIN:
            break
    return float(peak)


@compiled_part
def _ideal(rule: int, speed_G: Any, load_G: Any, flow_S: Any) -> float:
    """The level of all devices in perfect balance."""
    amount, speed = 0.0, 0.0
    for g in range(len(speed_G)):
        amount += load_G[g]
        speed += speed_G[g]
    if rule == ONE:
        amount = 0.0
        for s in range(len(flow_S)):
            amount += min(flow_S[s], 1.0)
    return max(amount / speed, 1e-300)


@compiled_part
def _level(rule: int, held: Held, speed_G: Any, load_G: Any, flow_S: Any, g: int) -> float:
    amount = _active(held, flow_S, g) if rule == ONE else load_G[g]
    return float(amount / speed_G[g])


@compiled_part
def fullest_device(amount_G: Any, speed_G: Any) -> int:
    """The device with most over speed; ties to the first."""
    fullest = 0
    for g in range(1, len(amount_G)):
        if amount_G[g] * speed_G[fullest] > amount_G[fullest] * speed_G[g]:
            fullest = g
    return fullest


@compiled_part
def _fullest(rule: int, held: Held, speed_G: Any, load_G: Any, flow_S: Any) -> int:
    """The device of the highest level; ties to the first."""
    if rule != ONE:
        return fullest_device(load_G, speed_G)
    fullest, highest = 0, -1.0
    for g in range(len(speed_G)):
        level = _active(held, flow_S, g) / speed_G[g]
        if level > highest:
            fullest, highest = g, level
    return fullest


@compiled_part
def _active(held: Held, flow_S: Any, g: int) -> float:
    """Slots with tokens; below one token that share of a slot: tokens are whole."""
    active = 0.0
    for s in range(held.start_G[g], held.start_G[g + 1]):
        active += min(flow_S[s], 1.0)
    return active


@compiled_part
def _lift(held: Held, e: int, load_G: Any, flow_S: Any) -> None:
    """Take one expert's tokens off its devices."""
    for r in range(held.replicas_E[e]):
        s = held.slot_ER[e, r]
        load_G[held.device_S[s]] -= flow_S[s]
        flow_S[s] = 0.0


@compiled_part
def _pour(
    rule: int, held: Held, speed_G: Any, e: int, tokens: float, load_G: Any, flow_S: Any
) -> None:
    """Put one expert's tokens on its replicas, as the dispatch would."""
    replicas, slot_R, device_S = held.replicas_E[e], held.slot_ER[e], held.device_S
    if tokens <= 0.0:
        return
    if replicas == 1:
        flow_S[slot_R[0]] = tokens
        load_G[device_S[slot_R[0]]] += tokens
        return
    if rule == ALIKE:
        for r in range(replicas):
            flow_S[slot_R[r]] = tokens / replicas
            load_G[device_S[slot_R[r]]] += tokens / replicas
        return
    if rule == ONE:
        s = _least_active(held, slot_R, replicas, speed_G, load_G, flow_S)
        flow_S[s] = tokens
        load_G[device_S[s]] += tokens
        return
    if replicas == 2:
        a, b = slot_R[0], slot_R[1]
        ga, gb = device_S[a], device_S[b]
        share = speed_G[ga] / (speed_G[ga] + speed_G[gb])
        amount = (tokens + load_G[ga] + load_G[gb]) * share - load_G[ga]
        amount = min(tokens, max(0.0, amount))
        flow_S[a], flow_S[b] = amount, tokens - amount
        load_G[ga] += amount
        load_G[gb] += tokens - amount
        return
    # The common level of all replicas' devices; those above it drop out, which lowers it.
    level = np.inf
    for _ in range(replicas):
        below_load, below_speed = tokens, 0.0
        for r in range(replicas):
            g = device_S[slot_R[r]]
            if load_G[g] <= level * speed_G[g]:
                below_load += load_G[g]
                below_speed += speed_G[g]
        if below_speed == 0.0 or below_load >= level * below_speed:
            break
        level = below_load / below_speed
    for r in range(replicas):
        g = device_S[slot_R[r]]
        amount = max(0.0, level * speed_G[g] - load_G[g])
        flow_S[slot_R[r]] = amount
        load_G[g] += amount


@compiled_part
def _least_active(
    held: Held, slot_R: Any, replicas: int, speed_G: Any, load_G: Any, flow_S: Any
) -> int:
    """The replica's slot on the device with fewest active slots over speed, then fewest tokens."""
    best, least, fewest = slot_R[0], np.inf, np.inf
    for r in range(replicas):
        g = held.device_S[slot_R[r]]
        active = np.rint(_active(held, flow_S, g) + 1.0) / speed_G[g]
        tokens = load_G[g] / speed_G[g]
        if active < least or (active == least and tokens < fewest):
            best, least, fewest = slot_R[r], active, tokens
    return int(best)
