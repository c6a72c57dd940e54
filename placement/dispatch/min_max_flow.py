"""Whole tokens from blocks to devices: the flattest split, and the cheapest one that is as flat.

A block is a group of tokens that may go to any of a few devices (its options), each at a small
whole-number cost. Knows blocks, options, loads and caps; knows nothing of experts, nodes or
payloads: `dispatch_balanced.py` and `dispatch_merged.py` give these their meaning.

Exact. The flattest split: water-fill, then push what is above the cap along shortest paths of the
device graph; where no path is left, the devices reached hold only tokens that cannot leave them,
so their mean is a lower bound on every split and becomes the next cap (Newton's iteration on the
tight set). The cheapest split under given caps: start every token at its cheapest option and push
the excess along cheapest paths (successive shortest paths), which keeps the cost minimal
throughout. Ties: fewer hops, then lower option index. No randomness.

Arrays of one problem. B blocks, O options, G devices:
tokens_B; start_B [B + 1]: options of block b are start_B[b]:start_B[b + 1]; device_O, cost_O;
flow_O: tokens of the block sent to this option (the answer); load_G: tokens per device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled
from .water_filling import caps_of, fill_flat, within

HOP = 1
COST = 1 << 20               # one unit of cost outweighs any number of hops (G < 2^20)
UNREACHED = 1 << 40


@compiled
def options_by_device(device_O: Any, devices: int) -> Any:
    """(start [G + 1], option [O]): the options that lie on each device."""
    start = np.zeros(devices + 1, np.int32)
    for d in device_O:
        start[d + 1] += 1
    for d in range(devices):
        start[d + 1] += start[d]
    option = np.empty(len(device_O), np.int32)
    cursor = start[:devices].copy()
    for o in range(len(device_O)):
        d = device_O[o]
        option[cursor[d]] = o
        cursor[d] += 1
    return start, option


@compiled
def block_of_option(start_B: Any) -> Any:
    """[O] the block each option belongs to."""
    block = np.empty(start_B[-1], np.int32)
    for b in range(len(start_B) - 1):
        block[start_B[b]:start_B[b + 1]] = b
    return block


@compiled
def _label_devices(
    start_B: Any, block_O: Any, device_O: Any, cost_O: Any, flow_O: Any, load_G: Any, cap_G: Any,
    start_G: Any, option_G: Any, label_G: Any, queue: Any, queued_G: Any,
) -> None:
    """Cheapest way from an overloaded device to every device: label = cost·COST + hops."""
    devices = len(load_G)
    head = 0
    waiting = 0
    for d in range(devices):
        label_G[d] = UNREACHED
        queued_G[d] = False
        if load_G[d] > cap_G[d]:
            label_G[d] = 0
            queued_G[d] = True
            queue[waiting] = d
            waiting += 1
    while waiting > 0:
        d = queue[head]
        head = (head + 1) % devices
        waiting -= 1
        queued_G[d] = False
        for i in range(start_G[d], start_G[d + 1]):
            o = option_G[i]
            if flow_O[o] == 0:
                continue
            b = block_O[o]
            for to in range(start_B[b], start_B[b + 1]):
                reach = label_G[d] + (cost_O[to] - cost_O[o]) * COST + HOP
                e = device_O[to]
                if reach < label_G[e] and to != o:
                    label_G[e] = reach
                    if not queued_G[e]:
                        queued_G[e] = True
                        queue[(head + waiting) % devices] = e
                        waiting += 1


@compiled
def _push_paths(
    start_B: Any, block_O: Any, device_O: Any, cost_O: Any, flow_O: Any, load_G: Any, cap_G: Any,
    start_G: Any, option_G: Any, label_G: Any, goal: int,
) -> None:
    """Send excess along the labelled paths until every one of cost `goal` is full.

    A path steps from device to device by moving tokens of one block between two of its options.
    Each device remembers how far its arcs were tried, so no arc is tried twice.
    """
    devices = len(load_G)
    arc_G = np.empty(devices, np.int32)       # position in option_G
    sibling_G = np.empty(devices, np.int32)   # next option of the block to try; -1 = from start
    for d in range(devices):
        arc_G[d] = start_G[d]
        sibling_G[d] = -1
    path_from = np.empty(devices + 1, np.int32)
    path_to = np.empty(devices + 1, np.int32)
    path_device = np.empty(devices + 1, np.int32)
    for source in range(devices):
        while load_G[source] > cap_G[source]:
            depth = 0
            path_device[0] = source
            found = False
            while True:
                d = path_device[depth]
                if depth > 0 and load_G[d] < cap_G[d] and label_G[d] // COST == goal:
                    found = True
                    break
                advanced = False
                while arc_G[d] < start_G[d + 1]:
                    o = option_G[arc_G[d]]
                    b = block_O[o]
                    if flow_O[o] > 0:
                        to = start_B[b] if sibling_G[d] < 0 else sibling_G[d]
                        while to < start_B[b + 1]:
                            step = (cost_O[to] - cost_O[o]) * COST + HOP
                            if to != o and label_G[device_O[to]] == label_G[d] + step:
                                advanced = True
                                break
                            to += 1
                        if advanced:
                            sibling_G[d] = to
                            break
                    arc_G[d] += 1
                    sibling_G[d] = -1
                if advanced:
                    path_from[depth] = o
                    path_to[depth] = to
                    depth += 1
                    path_device[depth] = device_O[to]
                elif depth > 0:
                    depth -= 1                 # a dead end: its arc is spent
                    sibling_G[path_device[depth]] += 1
                else:
                    break
            if not found:
                break
            amount = min(
                load_G[source] - cap_G[source],
                cap_G[path_device[depth]] - load_G[path_device[depth]],
            )
            for i in range(depth):
                amount = min(amount, flow_O[path_from[i]])
            for i in range(depth):
                flow_O[path_from[i]] -= amount
                flow_O[path_to[i]] += amount
            load_G[source] -= amount
            load_G[path_device[depth]] += amount


@compiled
def push_excess(
    start_B: Any, device_O: Any, cost_O: Any, flow_O: Any, load_G: Any, cap_G: Any
) -> Any:
    """Bring every device under its cap at least cost; False and the stuck devices if impossible.

    Returns (done, reached_G): reached_G marks the devices that the excess can get to; their
    tokens cannot leave them.
    """
    devices = len(load_G)
    label_G = np.empty(devices, np.int64)
    queued_G = np.empty(devices, np.bool_)
    if within(load_G, cap_G):
        return True, queued_G
    start_G, option_G = options_by_device(device_O, devices)
    block_O = block_of_option(start_B)
    queue = np.empty(devices, np.int32)
    while True:
        _label_devices(
            start_B, block_O, device_O, cost_O, flow_O, load_G, cap_G,
            start_G, option_G, label_G, queue, queued_G,
        )
        goal = UNREACHED
        for d in range(devices):
            if load_G[d] < cap_G[d] and label_G[d] < UNREACHED:
                goal = min(goal, label_G[d] // COST)
        if goal == UNREACHED:
            return False, label_G < UNREACHED
        _push_paths(
            start_B, block_O, device_O, cost_O, flow_O, load_G, cap_G,
            start_G, option_G, label_G, goal,
        )
        if within(load_G, cap_G):
            return True, queued_G


@compiled
def flatten(
    start_B: Any, device_O: Any, cost_O: Any, flow_O: Any, load_G: Any, speed_G: Any,
    peak: float, slack: float, cap_G: Any,
) -> float:
    """Move tokens until the highest level is the least possible; returns the proven bound on it.

    Starts from any complete split and from `peak`, a lower bound on the highest level. cost_O must
    be zero throughout. No device ends above cap_G = max(whole tokens at the bound, floor of
    bound·(1 + slack)); with slack 0 the bound is the exact fractional optimum rounded to tokens.
    """
    caps_of(peak, slack, speed_G, cap_G)
    while True:
        done, reached_G = push_excess(start_B, device_O, cost_O, flow_O, load_G, cap_G)
        if done:
            return peak
        load = 0.0
        speed = 0.0
        for d in range(len(load_G)):
            if reached_G[d]:
                load += load_G[d]
                speed += speed_G[d]
        peak = max(load / speed, peak)
        caps_of(peak, slack, speed_G, cap_G)


@compiled
def mean_level(tokens_B: Any, load_G: Any, speed_G: Any) -> float:
    """All tokens over all speed: no split can keep every device below it."""
    total = 0
    speed = 0.0
    for d in range(len(load_G)):
        total += load_G[d]
        speed += speed_G[d]
    for tokens in tokens_B:
        total += tokens
    return total / speed


@compiled
def flattest(
    tokens_B: Any, start_B: Any, device_O: Any, cost_O: Any, flow_O: Any, load_G: Any,
    speed_G: Any, slack: float, cap_G: Any,
) -> float:
    """Split the blocks so that the highest level (load / speed) is least; see `flatten`.

    load_G comes in with what cannot be split and goes out with everything.
    """
    peak = mean_level(tokens_B, load_G, speed_G)
    caps_of(peak, slack, speed_G, cap_G)
    fill_flat(tokens_B, start_B, start_B[1:], device_O, flow_O, load_G, speed_G, cap_G)
    return flatten(start_B, device_O, cost_O, flow_O, load_G, speed_G, peak, slack, cap_G)
