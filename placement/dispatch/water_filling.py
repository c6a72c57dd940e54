"""Water-filling: a quick split of blocks over devices that is nearly flat, in whole tokens.

A block's tokens are poured over its options until their levels (load over speed) are equal; blocks
in turn, heaviest first, again and again until every device is under its cap or nothing moves.
Knows blocks, options, loads and caps, laid out as `flow.py` tells, which finishes exactly what this
begins. Ties: lower option index. No randomness.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled

WATER_PASSES = 12


@compiled
def water_fill(
    tokens: int, first: int, last: int, device_O: Any, flow_O: Any, load_G: Any, speed_G: Any
) -> None:
    """Put `tokens` of one block on options first..last so that their levels are flat.

    Level = load / speed. Adds to load_G and sets flow_O. Left-over tokens of the rounding go to
    the option whose level stays lowest, lower index first.
    """
    if last - first == 2:
        _water_fill_pair(tokens, first, device_O, flow_O, load_G, speed_G)
        return
    # Options in order of level (insertion into `order`), then the highest level all can share.
    order = np.empty(last - first, np.int64)
    count = 0
    for o in range(first, last):
        flow_O[o] = 0
        level = load_G[device_O[o]] / speed_G[device_O[o]]
        at = count
        while at > 0:
            d = device_O[order[at - 1]]
            if load_G[d] / speed_G[d] <= level:
                break
            order[at] = order[at - 1]
            at -= 1
        order[at] = o
        count += 1
    below_load = 0.0
    below_speed = 0.0
    shared = 0.0
    used = 0
    for i in range(count):
        d = device_O[order[i]]
        if used > 0 and load_G[d] / speed_G[d] >= shared:
            break
        below_load += load_G[d]
        below_speed += speed_G[d]
        shared = (tokens + below_load) / below_speed
        used = i + 1
    left = tokens
    for i in range(used):
        o = order[i]
        d = device_O[o]
        amount = min(left, max(0, int(np.floor(shared * speed_G[d] + 1e-9)) - load_G[d]))
        flow_O[o] = amount
        load_G[d] += amount
        left -= amount
    while left > 0:
        best = first
        best_level = np.inf
        for o in range(first, last):
            d = device_O[o]
            level = (load_G[d] + 1) / speed_G[d]
            if level < best_level:
                best, best_level = o, level
        flow_O[best] += 1
        load_G[device_O[best]] += 1
        left -= 1


@compiled
def _water_fill_pair(
    tokens: int, first: int, device_O: Any, flow_O: Any, load_G: Any, speed_G: Any
) -> None:
    """`water_fill` for two options."""
    a = device_O[first]
    b = device_O[first + 1]
    if speed_G[a] == speed_G[b]:
        amount = (tokens + load_G[b] - load_G[a] + 1) >> 1
    else:
        level = (tokens + load_G[a] + load_G[b]) / (speed_G[a] + speed_G[b])
        amount = int(np.floor(level * speed_G[a] + 1e-9)) - load_G[a]
        if (load_G[a] + amount + 1) / speed_G[a] < (load_G[b] + tokens - amount) / speed_G[b]:
            amount += 1
    amount = min(tokens, max(0, amount))
    flow_O[first] = amount
    flow_O[first + 1] = tokens - amount
    load_G[a] += amount
    load_G[b] += tokens - amount


@compiled
def lift_out(first: int, last: int, device_O: Any, flow_O: Any, load_G: Any) -> None:
    """Take one block's tokens off its devices."""
    for o in range(first, last):
        load_G[device_O[o]] -= flow_O[o]
        flow_O[o] = 0


@compiled
def caps_of(peak: float, slack: float, speed_G: Any, cap_G: Any) -> None:
    """Whole tokens each device may hold at level `peak`, or at peak·(1 + slack) if that is more."""
    for d in range(len(speed_G)):
        exact = peak * speed_G[d]
        cap_G[d] = max(int(np.ceil(exact - 1e-9 * exact)), int(np.floor(exact * (1 + slack))))


@compiled
def within(load_G: Any, cap_G: Any) -> bool:
    """Whether no device is above its cap."""
    above = 0
    for d in range(len(load_G)):
        above += load_G[d] > cap_G[d]
    return above == 0


@compiled
def falling_order(value_B: Any) -> Any:
    """[B] indices, largest value first, lower index first among equals (merge sort).

    numpy's argsort would do, but compiling it costs more than all of this file.
    """
    count = len(value_B)
    order = np.empty(count, np.int32)
    for i in range(count):
        order[i] = i
    other = np.empty(count, np.int32)
    width = 1
    while width < count:
        for low in range(0, count, 2 * width):
            middle = min(low + width, count)
            high = min(low + 2 * width, count)
            i, j = low, middle
            for at in range(low, high):
                if i < middle and (j >= high or value_B[order[i]] >= value_B[order[j]]):
                    other[at] = order[i]
                    i += 1
                else:
                    other[at] = order[j]
                    j += 1
        order, other = other, order
        width *= 2
    return order


@compiled
def fill_flat(
    tokens_B: Any, start_B: Any, end_B: Any, device_O: Any, flow_O: Any, load_G: Any,
    speed_G: Any, cap_G: Any,
) -> None:
    """Water-fill every block, heaviest first, again and again until under `cap_G` or stalled.

    Block b uses its options start_B[b]:end_B[b]. load_G holds what cannot be split; the blocks'
    tokens are added. Costs play no part.
    """
    order_B = falling_order(tokens_B)
    for b in order_B:
        water_fill(tokens_B[b], start_B[b], end_B[b], device_O, flow_O, load_G, speed_G)
    for _ in range(WATER_PASSES):
        if within(load_G, cap_G):
            return
        moved = 0
        for b in order_B:
            first, last = start_B[b], end_B[b]
            if last - first < 2:
                continue
            before = flow_O[first]
            lift_out(first, last, device_O, flow_O, load_G)
            water_fill(tokens_B[b], first, last, device_O, flow_O, load_G, speed_G)
            moved += abs(flow_O[first] - before)
        if moved == 0:
            return
