"""Search for time: placements whose slowest device is done soonest, on sampled steps.

Balance of tokens is not balance of time: every active copy reads its weights, on a slow device
more slowly, and each device pays its start. So a device's level is its time, and replicas may be
dropped as well as added. `anneal_time.py` holds the loops.

Exchanges enter by the device that gets most tokens, at their price in bytes; what else they depend
on, and the counts, `step_cost` says when candidates are judged. Knows one layer's task. Knows
nothing of other layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..traces.spec import ModelSpec
from .anneal_time import ALIKE, FLAT, ONE, DeviceTimes, Layout, anneal
from .annealing import Annealing, SearchSpace, moves_price
from .cluster import Cluster
from .compiled import random_state
from .dispatch import needs_all_counts
from .layer_job import LayerTask
from .methods import LayerLoads, eplb_global
from .pack import pack_heaviest_first
from .plan import DispatchSpec
from .replicate import copies_by_load
from .tables import interpolate

FloatArray = npt.NDArray[np.float64]
SlotArray = npt.NDArray[np.int16]

RULES = {"balanced": FLAT, "fewest_active": ONE}    # all others: copies share alike, or nearly so
SPARE_SHARES = (0.0, 0.25, 0.5, 1.0)                # of spare slots that starts fill
MOVES_PER_SLOT, FEWEST_MOVES = 40, 8_000
HOT, COLD = 5e-3, 5e-5      # temperatures, in units of the mean step's time


def time_candidates(
    task: LayerTask, loads: LayerLoads, space: SearchSpace, balanced_GC: SlotArray, moves: float
) -> Iterator[tuple[str, SlotArray]]:
    """(name, slots): packed by time at several numbers of replicas, then searched.

    balanced_GC: what a search for balance found, the other place to start from. moves: 1 = normal
    effort.
    """
    if len(set(loads.slots_G.tolist())) == 1 and loads.room_G is None:
        yield "eplb", eplb_global(loads)
    packed = []
    slots = int(loads.usable_slots_G().sum())
    for share in SPARE_SHARES:
        keep = loads.experts + round(share * (slots - loads.experts))
        start = packed_by_time(task, loads, keep)
        if start is not None and (not packed or keep > loads.experts):
            packed.append(start)
            yield f"packed by time, {keep} of {slots} slots", start
    for name, start in (("packed by time", packed[:1]), ("balance", [balanced_GC])):
        for slots_GC in start:
            yield f"search for time from {name}", search_time(task, space, slots_GC, moves)


def search_time(
    task: LayerTask, space: SearchSpace, start_GC: SlotArray, moves: float = 1.0
) -> SlotArray:
    """Anneal from these slots on the mean time of the steps to search on."""
    load_WE = _steps(task)
    times = device_times(task, load_WE)
    slots_G = np.asarray(space.slots_G)
    held = np.arange(start_GC.shape[1]) < slots_G[:, None]
    tried = round(moves * max(FEWEST_MOVES, MOVES_PER_SLOT * int(slots_G.sum())))
    layout = Layout(
        np.repeat(np.arange(len(slots_G)), slots_G), np.concatenate(([0], np.cumsum(slots_G))),
        np.asarray(space.speed_G),
    )
    _cost, best_S = anneal(
        space, times, layout, load_WE, np.full(len(load_WE), 1.0 / len(load_WE)),
        start_GC[held].astype(np.int64), moves_price(space, start_GC),
        Annealing(tried, HOT, COLD, 0.0, 0.0), random_state(task.seed, task.layer, 4),
    )
    found_GC = np.full(start_GC.shape, -1, np.int16)
    found_GC[held] = best_S
    return found_GC


def packed_by_time(task: LayerTask, loads: LayerLoads, keep: int) -> SlotArray | None:
    """Heaviest first onto the device that would finish first, by an expert's mean time.

    keep: slots to fill. A device takes as many experts as its speed allows, and slots are left
    empty where they would be too many. None where memory holds the experts another way only.
    """
    load_WE = _steps(task)
    copies_E = copies_by_load(loads.load_E, keep, loads.devices)
    weight_E = copies_E * mean_us_E(device_times(task, load_WE), load_WE, copies_E)
    slots_GC = pack_heaviest_first(
        weight_E, copies_E, loads.slots_G, loads.speed_G, size_E=loads.size_E, room_G=loads.room_G
    )
    return slots_GC if len(np.setdiff1d(np.arange(loads.experts), slots_GC)) == 0 else None


def mean_us_E(
    times: DeviceTimes, load_WE: FloatArray, copies_E: npt.NDArray[np.int64]
) -> FloatArray:
    """[E] mean time over steps of one of an expert's copies, its share of the exchange included."""
    tokens_WE = load_WE / copies_E
    used_WE = np.minimum(tokens_WE, 1.0)
    if len(times.table_us):
        us_WE = used_WE * np.interp(
            np.maximum(tokens_WE, 1.0), np.arange(len(times.table_us)), times.table_us
        )
    else:
        us_WE = used_WE * times.read_us_E + tokens_WE * times.token_us
    return np.asarray((us_WE + tokens_WE * times.link_us).mean(axis=0), np.float64)


def device_times(task: LayerTask, load_WE: FloatArray) -> DeviceTimes:
    """The task's hardware, model and dispatch as the search sees them."""
    assert task.model is not None
    cluster, model = task.cluster, task.model
    hardware, compute = cluster.hardware, cluster.hardware.compute
    gathers = needs_all_counts(task.dispatch) and not hardware.counts_always
    table_us = np.zeros(0)
    if compute.expert_table_tokens:
        most = int(load_WE.max(initial=1.0)) + 2
        table_us = interpolate(
            np.arange(most + 1), compute.expert_table_tokens, compute.expert_table_us
        )[0]
    read_us_E = compute.active_expert_us + (
        model.bytes_per_expert_E() / compute.hbm_bytes_per_s * 1e6
    )
    times = DeviceTimes(
        start_us=compute.start_us, read_us_E=np.asarray(read_us_E, np.float64),
        token_us=float(model.flops_per_assignment / compute.flops_per_s * 1e6),
        table_us=np.ascontiguousarray(table_us, np.float64), link_us=_link_us(cluster, model),
        gather_us=hardware.counts_collective_us if gathers else 0.0, rule=_rule(task.dispatch),
        reference_us=1.0,
    )
    work_us = float(mean_us_E(times, load_WE, np.ones(load_WE.shape[1], np.int64)).sum())
    ideal_us = times.start_us + work_us / float(cluster.speed_G.sum())
    return times._replace(reference_us=max(ideal_us, 1e-9))


def _rule(dispatch: DispatchSpec) -> int:
    return RULES.get(dispatch.policy, ALIKE)


def _link_us(cluster: Cluster, model: ModelSpec) -> float:
    """Microseconds that one more token on the fullest device adds to both exchanges.

    Homes count as spread evenly. Copies to one rank that are sent once count by how many remain of
    a token's choices when these fall anywhere. Between nodes, `per_node` copies are shared by the
    node's ports, whichever device computes.
    """
    devices, nodes, choices = cluster.num_devices, cluster.num_nodes, model.top_k
    traffic, hardware = cluster.traffic, cluster.hardware
    if devices == 1 or traffic.mode == "allgather":
        return 0.0
    merged = traffic.mode == "return_home" and traffic.payload != "per_expert"
    kept = devices / choices * (1.0 - (1.0 - 1.0 / devices) ** choices) if merged else 1.0
    near = kept * (1.0 / nodes - 1.0 / devices)
    far = 0.0 if nodes == 1 or (merged and traffic.payload == "per_node") else (
        kept * (1.0 - 1.0 / nodes)
    )
    legs = [(hardware.dispatch, hardware.dispatch_bytes_per_value)]
    if traffic.mode == "return_home":
        legs.append((hardware.combine, hardware.combine_bytes_per_value))
    return sum(
        float(model.hidden or 0) * value_bytes * 1e6
        * max(near / leg.nvlink_bytes_per_s, far / leg.nic_bytes_per_s)
        for leg, value_bytes in legs
    )


def _steps(task: LayerTask) -> FloatArray:
    """[W, E] tokens of the steps to search on that are as large as the planning steps."""
    load_WE = task.traffic.search_WE()
    total_W = load_WE.sum(axis=1)
    full = total_W >= 0.9 * task.traffic.planning_WE().sum(axis=1).mean()
    return np.ascontiguousarray(load_WE[full & (total_W > 0)], np.float64)
