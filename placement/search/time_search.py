"""Search for time: placements whose slowest device is done soonest, on sampled steps.

Balance of tokens is not balance of time: every active replica reads its weights, on a slow device
more slowly, and each device pays its start. So a device's level is its time, and replicas may be
dropped as well as added. `annealing/step_time.py` holds the objective.

Exchanges enter by the device that gets most tokens, at their price in bytes; what else they depend
on, and the counts, `step_cost` says when candidates are judged. Knows one layer's task. Knows
nothing of other layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import FloatArray, SlotArray
from ...foundation.compiled import random_state
from ...traces.model_spec import ModelSpec
from ..cluster import Cluster
from ..dispatch.quotas import needs_all_counts
from ..hardware import interpolate
from ..methods.baselines import LayerLoads
from ..methods.pack import pack_heaviest_first
from ..methods.replicate import replicas_by_load
from ..plan import DispatchSpec
from ..planning_traffic import MOST_STEPS
from .annealing.annealer import Schedule, SearchSpace
from .annealing.step_time import DeviceTimes, improve_step_time
from .annealing.token_split import ALIKE, LEVEL, ONE
from .known_candidates import complete, widened
from .layer_task import LayerTask, score

RULES = {"balanced": LEVEL, "fewest_active": ONE}   # all others: equal shares, or nearly so
SPARE_SHARES = (0.0, 0.25, 0.5, 1.0)                # of spare slots that starts fill
MOVES_PER_SLOT, FEWEST_MOVES = 40, 8_000
HOT, COLD = 1e-3, 3e-5      # temperatures, in units of the mean step's time


def time_candidates(
    task: LayerTask, loads: LayerLoads, space: SearchSpace, balanced_GC: SlotArray, moves: float
) -> Iterator[tuple[str, SlotArray]]:
    """(name, slots): packed by time at several numbers of replicas, then searched.

    balanced_GC: what a search for balance found, the other place to start from. moves: 1 = normal
    effort.
    """
    slots = int(loads.usable_slots_G().sum())
    packed: list[tuple[float, str, SlotArray]] = []
    for share in SPARE_SHARES:
        keep = loads.experts + round(share * (slots - loads.experts))
        found = {"by load": packed_by_load(loads, keep)}
        if share == 0.0:
            found["by time"] = packed_by_time(task, loads)
        for how, slots_GC in found.items():
            name = f"packed {how}, {keep} of {slots} slots"
            if slots_GC is not None:
                yield name, slots_GC
                packed.append((_planning_us(task, slots_GC), name, slots_GC))
    starts = [(name, slots_GC) for _us, name, slots_GC in sorted(packed, key=lambda p: p[0])[:1]]
    for name, slots_GC in [*starts, ("balance", balanced_GC)]:
        yield f"search for time, {name}", search_time(task, space, slots_GC, moves)


def _planning_us(task: LayerTask, slots_GC: SlotArray) -> float:
    time_us = score(task, slots_GC, task.traffic.planning).time_us
    assert time_us is not None
    return time_us


def search_time(
    task: LayerTask, space: SearchSpace, start_GC: SlotArray, moves: float = 1.0
) -> SlotArray:
    """Anneal from these slots on the mean time of the steps to search on."""
    load_WE = _steps(task)
    slots = int(np.asarray(space.slots_G).sum())
    tried = round(moves * max(FEWEST_MOVES, MOVES_PER_SLOT * slots))
    return improve_step_time(
        space, device_times(task, load_WE), load_WE, start_GC,
        Schedule(tried, HOT, COLD, task.until()),
        random_state(task.seed, task.layer, 4),
    ).best_GC


def packed_by_load(loads: LayerLoads, keep: int) -> SlotArray | None:
    """Heaviest first, on `keep` slots dealt to devices in proportion to their speed.

    None where memory, or an expert with more replicas than devices are dealt slots, forbids it.
    """
    slots_G = slots_by_speed(loads, keep)
    replicas_E = replicas_by_load(loads.load_E, keep, int((slots_G > 0).sum()))
    slots_GC = widened(pack_heaviest_first(
        loads.load_E, replicas_E, slots_G, loads.speed_G, size_E=loads.size_E,
        capacity_G=loads.capacity_G
    ), loads.most_slots)
    return slots_GC if complete(slots_GC, loads.experts) else None


def slots_by_speed(loads: LayerLoads, keep: int) -> npt.NDArray[np.int64]:
    """[G] slots, one by one to the device whose slots over speed stay lowest; ties to the first."""
    slots_G = np.zeros(loads.devices, np.int64)
    most_G = loads.usable_slots_G()
    for _ in range(keep):
        level_G = np.where(slots_G < most_G, (slots_G + 1) / loads.speed_G, np.inf)
        slots_G[int(np.argmin(level_G))] += 1
    return slots_G


def packed_by_time(task: LayerTask, loads: LayerLoads) -> SlotArray | None:
    """One replica each, heaviest first onto the device that would finish first, by mean time."""
    load_WE = _steps(task)
    replicas_E = np.ones(loads.experts, np.int64)
    slots_GC = pack_heaviest_first(
        mean_us_E(device_times(task, load_WE), load_WE), replicas_E, loads.slots_G, loads.speed_G,
        size_E=loads.size_E, capacity_G=loads.capacity_G,
    )
    return slots_GC if complete(slots_GC, loads.experts) else None


def mean_us_E(times: DeviceTimes, load_WE: FloatArray) -> FloatArray:
    """[E] mean time over steps of an expert's only replica, its share of the exchange included."""
    used_WE = np.minimum(load_WE, 1.0)
    if len(times.table_us):
        us_WE = used_WE * np.interp(load_WE, np.arange(len(times.table_us)), times.table_us)
    else:
        us_WE = used_WE * times.read_us_E + load_WE * times.token_us
    return np.asarray((us_WE + load_WE * times.link_us).mean(axis=0), np.float64)


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
    work_us = float(mean_us_E(times, load_WE).sum())
    ideal_us = times.start_us + work_us / float(cluster.speed_G.sum())
    return times._replace(reference_us=max(ideal_us, 1e-9))


def _rule(dispatch: DispatchSpec) -> int:
    return RULES.get(dispatch.policy, ALIKE)


def _link_us(cluster: Cluster, model: ModelSpec) -> float:
    """Microseconds that one more token on the fullest device adds to both exchanges.

    Homes count as spread evenly. Replicas to one rank that are sent once count by how many remain
    of a token's choices when these fall anywhere. Between nodes, `per_node` replicas are shared by
    the node's ports, whichever device computes.
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
    """[W, E] tokens of the planning steps, and of others to search on that are as large."""
    planning_WE = task.traffic.planning_WE()
    others_WE = task.traffic.search_WE()[min(len(planning_WE), MOST_STEPS):]
    full_W = others_WE.sum(axis=1) >= 0.9 * planning_WE.sum(axis=1).mean()
    load_WE = np.concatenate([planning_WE, others_WE[full_W]])
    return np.ascontiguousarray(load_WE[load_WE.sum(axis=1) > 0], np.float64)
