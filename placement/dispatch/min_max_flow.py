"""Whole tokens from blocks to devices: the flattest split, and the cheapest one that is as flat.

A block is a group of tokens that may go to any of a few devices (its options), each at a small
whole-number cost. Tokens flow from blocks over options to devices:

    block 0 (7 tokens) --4-- option 0 --> device 0   load 4 + what cannot be split
                       `-3-- option 1 --> device 2
    block 1 (2 tokens) --2-- option 2 --> device 0
                       `-0-- option 3 --> device 1

Loads are evened out by moving tokens of one block from one of its options to another: an arc of the
device graph, here 0 -> 2 (by block 0) and 0 -> 1 (by block 1). Along a path of arcs the tokens
change devices at its ends only. Knows blocks, options, loads and caps; knows nothing of experts,
nodes or payloads: `balanced.py` and `deduplicated.py` give these their meaning.

1. Water-filling (`fill_flat`) begins: each block's tokens are poured over its options until their
   levels (load over speed) are equal, heaviest block first, again and again until every device is
   under its cap or nothing moves. Nearly flat, and quick.
2. Minimum-cost flow (`push_excess`) brings every device under its cap exactly: successive shortest
   paths from the devices above their caps to those below. Labels are shortest distances (cost, then
   number of arcs), by Bellman-Ford with a queue; then all paths of the least cost are filled: a
   blocking flow on the admissible graph (arcs that lie on shortest paths), found depth first with
   a current arc per device, as in Dinic's algorithm (Goldberg and Tarjan's terms). Tokens start at
   their cheapest option, so the cost stays minimal throughout.
3. The least cap (`flatten`). Where no path is left, the devices that the excess can reach hold only
   tokens that cannot leave them, so their mean level is a lower bound on every split; it becomes
   the next cap, which is Newton's (Dinkelbach's) iteration on the tight set.

Exact; no randomness. Ties: fewer arcs, then lower option index.

Arrays of one problem. B blocks, O options, G devices:
tokens_B; start_B [B + 1]: options of block b are start_B[b]:start_B[b + 1]; device_O, cost_O;
flow_O: tokens of the block sent to this option (the answer); load_G: tokens per device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled

WATER_PASSES = 12
ROUNDING = 1e-9              # relative, by which a level may be off
ARC = 1
COST = 1 << 20               # one unit of cost outweighs any number of arcs (G < 2^20)
UNREACHED = 1 << 40


# ---- caps and order --------------------------------------------------------------------------


@compiled
def caps_of(peak: float, slack: float, speed_G: Any, cap_G: Any) -> None:
    """Whole tokens each device may hold at level `peak`, or at peak·(1 + slack) if that is more."""
    for d in range(len(speed_G)):
        exact = peak * speed_G[d]
        rounded = int(np.ceil(exact - ROUNDING * exact))
        cap_G[d] = max(rounded, int(np.floor(exact * (1 + slack))))


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


# ---- 1. water-filling ------------------------------------------------------------------------


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


# ---- 2. minimum-cost flow --------------------------------------------------------------------


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
    """Cheapest way from an overloaded device to every device: label = cost·COST + arcs."""
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
                reach = label_G[d] + (cost_O[to] - cost_O[o]) * COST + ARC
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
    """Send excess along shortest paths until every one of cost `goal` is full: a blocking flow."""
    devices = len(load_G)
    current_arc_G = start_G[:devices].copy()               # position in option_G
    current_target_G = np.full(devices, -1, np.int32)      # next option of its block; -1: the first
    path_from = np.empty(devices + 1, np.int32)
    path_to = np.empty(devices + 1, np.int32)
    path_device = np.empty(devices + 1, np.int32)
    for source in range(devices):
        while load_G[source] > cap_G[source]:
            path_device[0] = source
            arcs = _find_path(
                start_B, block_O, device_O, cost_O, flow_O, load_G, cap_G, start_G, option_G,
                label_G, goal, current_arc_G, current_target_G, path_from, path_to, path_device,
            )
            if arcs < 0:
                break
            _augment(arcs, flow_O, load_G, cap_G, path_from, path_to, path_device)


@compiled
def _find_path(
    start_B: Any, block_O: Any, device_O: Any, cost_O: Any, flow_O: Any, load_G: Any, cap_G: Any,
    start_G: Any, option_G: Any, label_G: Any, goal: int, current_arc_G: Any,
    current_target_G: Any, path_from: Any, path_to: Any, path_device: Any,
) -> int:
    """A shortest path from path_device[0] to a device below its cap: its arcs, -1 if there is none.

    Depth first. Each device remembers its current arc, so no arc is tried twice: what is before it
    is full or leads to a dead end.
    """
    depth = 0
    while True:
        d = path_device[depth]
        if depth > 0 and load_G[d] < cap_G[d] and label_G[d] // COST == goal:
            return depth
        advanced = False
        while current_arc_G[d] < start_G[d + 1]:
            o = option_G[current_arc_G[d]]
            b = block_O[o]
            if flow_O[o] > 0:
                to = start_B[b] if current_target_G[d] < 0 else current_target_G[d]
                while to < start_B[b + 1]:
                    step = (cost_O[to] - cost_O[o]) * COST + ARC
                    if to != o and label_G[device_O[to]] == label_G[d] + step:
                        advanced = True
                        break
                    to += 1
                if advanced:
                    current_target_G[d] = to
                    break
            current_arc_G[d] += 1
            current_target_G[d] = -1
        if advanced:
            path_from[depth] = o
            path_to[depth] = to
            depth += 1
            path_device[depth] = device_O[to]
        elif depth > 0:
            depth -= 1                 # a dead end: its arc is spent
            current_target_G[path_device[depth]] += 1
        else:
            return -1


@compiled
def _augment(
    arcs: int, flow_O: Any, load_G: Any, cap_G: Any, path_from: Any, path_to: Any,
    path_device: Any,
) -> None:
    """Move along the path as many tokens as its ends and its arcs allow."""
    source, target = path_device[0], path_device[arcs]
    amount = min(load_G[source] - cap_G[source], cap_G[target] - load_G[target])
    for i in range(arcs):
        amount = min(amount, flow_O[path_from[i]])
    for i in range(arcs):
        flow_O[path_from[i]] -= amount
        flow_O[path_to[i]] += amount
    load_G[source] -= amount
    load_G[target] += amount


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


# ---- 3. the least cap ------------------------------------------------------------------------


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
        # Where rounding to the caps hides the rise, still rise: of a billion tokens it is one.
        peak = max(load / speed, peak * (1.0 + ROUNDING))
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
