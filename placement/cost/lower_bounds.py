"""Lower bounds: how good any plan could be on given steps, however it places experts.

Knows loads, homes, slots, speeds and prices; never looks at a plan, so a bound holds for all.
Every bound here is proved in its docstring; `checked_gap` refuses a bound above the objective,
always.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import LoadmasterError
from ...foundation.arrays import FloatArray
from ...foundation.compiled import compiled
from ...traces.model_spec import ModelSpec
from ..cluster import Cluster
from ..hardware import ExchangeProfile, interpolate

ROUNDING = 1e-9     # of the objective: sums in another order may differ by this much


class BoundError(LoadmasterError):
    """A bound above an objective that was reached: one of the two is wrong. Always a defect."""


def checked_gap(objective: float, bound: float, where: str) -> tuple[float, float]:
    """(bound, gap) with gap = (objective − bound) / bound; 0 where both are 0.

    A bound within rounding of the objective is lowered to it. Raises BoundError when the bound is
    above the objective: no plan may be reported as better than the best possible.
    """
    if not (np.isfinite(objective) and np.isfinite(bound)):
        raise BoundError(f"{where}: objective {objective} and bound {bound} must be finite")
    if bound > objective + ROUNDING * max(abs(objective), 1.0):
        raise BoundError(
            f"{where}: bound {bound!r} is above the objective {objective!r}; please report this "
            "with the trace that shows it"
        )
    bound = min(bound, objective)
    return bound, (objective - bound) / bound if bound > 0 else 0.0


def balance_bound_W(load_WE: FloatArray, slots: int, speed_G: FloatArray) -> FloatArray:
    """[W] least possible peak (`evaluate.peak_of`) of each step, whatever placement and split.

    load_WE [W, E] tokens; slots: S in the layer. Steps without load give 1. Proof: (1) the busiest
    device is not below perfect balance. (2) An expert with r replicas is computed by at most r
    devices, at best the r fastest, so one of them is at load / speed_r or above, speed_r the sum of
    the r highest speeds; all experts together have at most S replicas. For a level z expert e needs
    r_e(z) = least r with load_e <= z·speed_r; if the r_e sum above S, z is out of reach. The bound
    is the least z that passes, found by bisection from below.
    """
    total_W = load_WE.sum(axis=1)
    ideal_W = np.where(total_W > 0, total_W / speed_G.sum(), 1.0)
    relative = np.ascontiguousarray(load_WE / ideal_W[:, None], np.float64)
    return _balance_bound(relative, slots, np.cumsum(np.sort(speed_G)[::-1]))


def most_replicas(cluster: Cluster, model: ModelSpec | None, layers: int, experts: int) -> int:
    """Replicas that one layer can hold at most, however the layers share the devices' memory.

    Proof: no device needs two replicas of an expert. Every other layer holds each expert at least
    once, so what memory holds in all, less one of every expert and layer, is the most that one
    layer can have beyond its own E; counted in smallest experts, device by device and in all.
    """
    most = int(np.minimum(cluster.slots_G, experts).sum())
    memory = [device.expert_memory_bytes for device in cluster.devices]
    if model is None or not model.knows_bytes or None in memory:
        return most
    size_E = model.bytes_per_expert_E().astype(np.float64)
    memory_G = np.array(memory, np.float64)
    held_G = np.minimum(memory_G // size_E.min(), layers * cluster.slots_G)
    by_device = held_G.sum() - layers * experts
    in_all = (memory_G.sum() - layers * size_E.sum()) // size_E.min()
    return min(most, experts + max(0, int(min(by_device, in_all))))


@compiled
def _balance_bound(relative_WE: FloatArray, slots: int, level_R: FloatArray) -> FloatArray:
    steps = len(relative_WE)
    bound_W = np.ones(steps)
    for w in range(steps):
        low, high = 1.0, max(1.0, relative_WE[w].max() / level_R[0])
        if high == 1.0 or _replicas_needed(relative_WE[w], low, level_R) <= slots:
            continue
        for _ in range(60):
            middle = 0.5 * (low + high)
            if _replicas_needed(relative_WE[w], middle, level_R) <= slots:
                high = middle
            else:
                low = middle
        bound_W[w] = low
    return bound_W


@compiled
def _replicas_needed(relative_E: FloatArray, level: float, level_R: FloatArray) -> int:
    needed = 0
    for load in relative_E:
        replicas = int(np.searchsorted(level_R, load / level * (1.0 - 1e-12))) + 1
        needed += min(replicas, len(level_R) + 1)
    return needed


def time_bound_us(
    load_WE: FloatArray,
    model: ModelSpec,
    cluster: Cluster,
    counts_WGE: npt.NDArray[np.integer[Any]] | None = None,
) -> FloatArray:
    """[W] least possible microseconds of one layer in each step under any placement and split.

    Proof: an expert with tokens reads its weights at least once and computes each token once, so
    the work of all devices is at least sum of reads + tokens · flops, and the device that finishes
    last takes at least that over all speed; it is busy, so it pays the start as well. An exchange
    takes at least its alpha and, with counts_WGE [W, G, E] by home rank, what `least_sent_W` says
    must cross. The counts collective is paid where it is paid in every layer; else a plan
    without replicas does without. Steps without tokens pay the exchange alone.
    """
    hardware = cluster.hardware
    compute = hardware.compute
    used_WE = load_WE > 0
    tokens_W = load_WE.sum(axis=1)
    if compute.expert_table_tokens:
        # A table may bend either way: its least time per token, and per active expert, are safe.
        time_us = np.asarray(compute.expert_table_us, np.float64)
        work_W = used_WE.sum(axis=1) * float(time_us.min())
    else:
        bytes_E = model.bytes_per_expert_E()
        read_us_E = bytes_E / compute.hbm_bytes_per_s * 1e6 + compute.active_expert_us
        flops_us = model.flops_per_assignment / compute.flops_per_s * 1e6
        work_W = used_WE @ read_us_E + tokens_W * flops_us
    start_us = compute.start_us / float(cluster.speed_G.max())
    compute_W = np.where(tokens_W > 0, start_us + work_W / float(cluster.speed_G.sum()), 0.0)
    if cluster.num_devices == 1:
        return np.asarray(compute_W)
    fixed_us = hardware.counts_collective_us if hardware.counts_always else 0.0
    sent_W = np.zeros(len(load_WE))
    if counts_WGE is not None:
        sent_W = least_sent_W(counts_WGE, cluster, model.top_k)
    legs = ((hardware.dispatch, hardware.dispatch_bytes_per_value),
            (hardware.combine, hardware.combine_bytes_per_value))
    exchange_W = np.zeros(len(load_WE))
    for leg, value_bytes in legs[: 1 if cluster.traffic.mode == "coherent" else 2]:
        exchange_W += _exchange_bound_us(
            leg, sent_W * float(model.hidden or 0) * value_bytes, cluster.num_nodes
        )
    return np.asarray(compute_W + fixed_us + exchange_W)


def least_sent_W(
    counts_WGE: npt.NDArray[np.integer[Any]], cluster: Cluster, top_k: int
) -> FloatArray:
    """[W] replicas that the busiest port sends at least: NVLink in one node, else the NICs.

    counts_WGE [W, G, E] assignments by home rank. Proof: a device (a node) holds at most as many
    experts as it has slots, so of its own tokens' assignments all but those to so many most used
    experts leave it, whatever the plan. One replica serves one assignment (`per_expert`), or up to
    top_k of one token where replicas at a destination are merged. A node's NICs share what leaves
    it. Traffic modes in which routing decides nothing, or not alone, are bounded by 0.
    """
    steps, devices, experts = counts_WGE.shape
    if cluster.traffic.mode != "return_home" or devices == 1:
        return np.zeros(steps)
    nodes = cluster.num_nodes
    destination_G = np.arange(devices) if nodes == 1 else cluster.node_G
    slots_P = np.bincount(destination_G, cluster.slots_G).astype(np.int64)
    ports_P = np.bincount(destination_G)
    sent_W = np.zeros(steps)
    for p in range(len(slots_P)):
        own_WE = np.asarray(counts_WGE[:, destination_G == p].sum(axis=1), np.float64)
        kept = min(int(slots_P[p]), experts)
        most_WC = np.partition(own_WE, experts - kept, axis=1)[:, experts - kept :]
        leaves_W = own_WE.sum(axis=1) - most_WC.sum(axis=1)
        sent_W = np.maximum(sent_W, leaves_W / ports_P[p])
    merged = cluster.traffic.payload != "per_expert"
    return np.asarray(sent_W / (top_k if merged else 1))


def _exchange_bound_us(leg: ExchangeProfile, bytes_W: FloatArray, nodes: int) -> FloatArray:
    """[W] no exchange is faster that sends so many bytes over its busiest port."""
    if nodes > 1 or not leg.table_us:
        alpha_us = leg.alpha_us + leg.alpha_per_log2_node_us * float(np.log2(nodes))
        rate = leg.nvlink_bytes_per_s if nodes == 1 else leg.nic_bytes_per_s
        return np.asarray(alpha_us + bytes_W / rate * 1e6)
    # A measured table may fall somewhere: what later points undercut does not count.
    least_us = np.minimum.accumulate(np.asarray(leg.table_us)[::-1])[::-1]
    return interpolate(bytes_W, leg.table_bytes, least_us.tolist())[0]
