"""How long one MoE step takes under a plan, and what moving experts costs.

Takes work per device and transfers per port (`traffic.py`) and returns microseconds. Knows nothing
of requests, queues, clocks or who asks: the planner, `evaluate` and the simulator price a plan with
the same function. Pure: no randomness, no state.

compute    a device's experts: start + active·fixed + weight bytes / HBM rate + tokens·flops / rate
           (or the device's measured table per active expert), over its speed, times its slowdown.
exchange   alpha + the most loaded port over its rate: NVLink in/out, NIC in/out, a node's spine;
           between nodes no less than under fair sharing.
counts     an all-gather of every rank's counts, where the dispatch needs them to choose among
           replicas; two where the counts are too many for one (`counts_gathers`). In a layer
           without replicas every rank knows where each token goes, whatever the dispatch, and
           nothing is gathered. That ranks tell each other how many rows come belongs to the
           exchange: it is in its alpha, measured with it. The live workers gather in every layer
           all the same (they agree on the plan's epoch in it); hardware profiles of theirs say so
           (`counts_always`).
layer      counts + dispatch + slowest device + combine, under the overlap active schedule.
           step = sum over layers + the other time.

Between nodes, where the loads say how long max-min fair sharing takes (`fair_sharing.py`), that is
the price: behind an oversubscribed spine the most loaded port is too low, at 2:1 by 6 to 13 % in
the median and up to a quarter (benchmarks/simulator.py, `oracle`). On more devices than rates are
dealt for, ports price it; behind a shared spine a note says so.

Sources: additive compute and port bound as fitted and checked in the presets' own `source` and
`error` texts; the port bound is exact in the median on a non-blocking fabric.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError, UsageError
from ...foundation.arrays import FloatArray, IntArray
from ...traces.model_spec import ModelSpec
from ..cluster import Cluster
from ..dispatch.quotas import needs_all_counts
from ..hardware import ComputeProfile, ExchangeProfile, interpolate
from ..plan import DispatchSpec, Plan
from .max_min_rates import MOST_DEALT, shares_a_spine
from .overlap import Overlap, schedule_layer
from .step_loads import StepLoads

SHARED_SPINE = (
    "a node's devices share its spine: the exchange is priced by its most loaded port, fair "
    f"sharing may take up to a quarter longer (its rates are dealt on up to {MOST_DEALT} devices "
    "with whole NICs)"
)
PORTS = ("nvlink_out", "nvlink_in", "nic_out", "nic_in", "spine_out", "spine_in")


@dataclass(frozen=True, eq=False)
class StepCost:
    """Times of W steps in microseconds, and who set them.

    straggler_WL: the device whose experts took longest. *_port_WL: the port that was busy longest,
    kind·G + device (node for the spine), kinds as in PORTS; -1 where nothing crossed.
    """

    compute_us_WLG: FloatArray
    dispatch_us_WL: FloatArray
    combine_us_WL: FloatArray
    counts_us_L: FloatArray
    layer_us_WL: FloatArray
    step_us_W: FloatArray
    straggler_WL: IntArray
    dispatch_port_WL: IntArray
    combine_port_WL: IntArray
    notes: tuple[str, ...] = ()


def step_cost(
    loads: StepLoads,
    model: ModelSpec,
    cluster: Cluster,
    *,
    dispatch: DispatchSpec,
    overlap: Overlap | None = None,
    slowdown_G: npt.ArrayLike | None = None,
    nic_share_G: FloatArray | None = None,
) -> StepCost:
    """Price every step and layer of `loads`.

    slowdown_G: factor on each device's compute time (stragglers), >= 0. nic_share_G: what is left
    of each device's NIC, in (0, 1]; fair rates are of whole NICs, so the price is then the larger
    of theirs and the ports'. Ties in blame go to the lowest index. Raises UsageError when the
    model's sizes are unknown.
    """
    if not model.knows_sizes:
        raise UsageError(
            f"{model.name}: {model.unsized}: time needs the model's hidden and intermediate sizes "
            "and its weights' format; give a ModelSpec that has them, or use objective balance"
        )
    notes: list[str] = []
    compute_WLG, fixed_WLG = _compute_us(loads, model, cluster, slowdown_G, notes)
    straggler_WL = np.argmax(compute_WLG, axis=2)
    slowest_WL = compute_WLG.max(axis=2)
    fixed_WL = np.take_along_axis(fixed_WLG, straggler_WL[:, :, None], axis=2)[:, :, 0]
    hardware = cluster.hardware
    sent = _exchange(loads, model, cluster, hardware.dispatch, hardware.dispatch_bytes_per_value,
                     False, nic_share_G, notes)
    back = _exchange(loads, model, cluster, hardware.combine, hardware.combine_bytes_per_value,
                     True, nic_share_G, notes)
    counts_L = _counts_us(loads, cluster, dispatch)
    if overlap is None:
        layer_WL = schedule_layer(None, slowest_WL, sent.whole_us, back.whole_us)
    else:
        layer_WL = schedule_layer(
            overlap, slowest_WL, sent.inter_us, back.inter_us, compute_fixed_WL=fixed_WL,
            dispatch_intra_WL=sent.intra_us, combine_intra_WL=back.intra_us,
            exchange_fixed_us=sent.fixed_us,
        )
    layer_WL = layer_WL + counts_L
    return StepCost(
        compute_us_WLG=compute_WLG, dispatch_us_WL=sent.whole_us, combine_us_WL=back.whole_us,
        counts_us_L=counts_L, layer_us_WL=layer_WL,
        step_us_W=layer_WL.sum(axis=1) + model.other_time_us, straggler_WL=straggler_WL,
        dispatch_port_WL=sent.port, combine_port_WL=back.port, notes=tuple(dict.fromkeys(notes)),
    )


def _counts_us(loads: StepLoads, cluster: Cluster, dispatch: DispatchSpec) -> FloatArray:
    """[L] the counts collectives of each layer."""
    layers, hardware = loads.tokens_WLG.shape[1], cluster.hardware
    if cluster.num_devices == 1 or not (hardware.counts_always or needs_all_counts(dispatch)):
        return np.zeros(layers)
    gathers_L = np.ones(layers) if loads.gathers_L is None else np.array(loads.gathers_L)
    if hardware.counts_always:
        gathers_L = np.maximum(gathers_L, 1)
    return np.asarray(gathers_L * hardware.counts_collective_us, np.float64)


def port_name(port: int, devices: int) -> str:
    """A blamed port in words: "nic_in of device 3", "spine_out of node 1", "none"."""
    if port < 0:
        return "none"
    kind, where = divmod(int(port), devices)
    return f"{PORTS[kind]} of {'node' if PORTS[kind].startswith('spine') else 'device'} {where}"


# ---- compute ----------------------------------------------------------------------------------


def _compute_us(
    loads: StepLoads,
    model: ModelSpec,
    cluster: Cluster,
    slowdown_G: npt.ArrayLike | None,
    notes: list[str],
) -> tuple[FloatArray, FloatArray]:
    """[W, L, G] time of each device's experts, and the part of it that tokens do not change."""
    profile = cluster.hardware.compute
    busy_WLG = loads.tokens_WLG > 0
    active_WLG = loads.active_WLG.astype(np.float64)
    if profile.expert_table_tokens:
        experts_WLG = _table_us(loads, profile, notes)
        fixed_WLG = active_WLG * profile.expert_table_us[0]
    else:
        read_us = weight_bytes_WLG(loads, model) / profile.hbm_bytes_per_s * 1e6
        fixed_WLG = active_WLG * profile.active_expert_us + read_us
        flops_us = model.flops_per_assignment / profile.flops_per_s * 1e6
        experts_WLG = fixed_WLG + loads.tokens_WLG * flops_us
    factor_G = np.asarray(1.0 / cluster.speed_G, np.float64)
    if slowdown_G is not None:
        slow_G = np.asarray(slowdown_G, np.float64)
        if slow_G.shape != factor_G.shape or not (np.isfinite(slow_G) & (slow_G >= 0)).all():
            raise UsageError(f"slowdown must be {len(factor_G)} finite factors >= 0")
        factor_G = factor_G * slow_G
    start_WLG = busy_WLG * profile.start_us
    return (start_WLG + experts_WLG) * factor_G, (start_WLG + fixed_WLG) * factor_G


def weight_bytes_WLG(loads: StepLoads, model: ModelSpec) -> FloatArray:
    """Expert weights each device reads: counted exactly, or active experts times the mean size."""
    if loads.weight_bytes_WLG is not None:
        return loads.weight_bytes_WLG
    return loads.active_WLG.astype(np.float64) * float(model.bytes_per_expert_E().mean())


def _table_us(loads: StepLoads, profile: ComputeProfile, notes: list[str]) -> FloatArray:
    """Time by the measured table: each active expert's own tokens where `loads` counted them."""
    if loads.expert_us_WLG is not None:
        if loads.expert_us_extrapolated:
            notes.append("more tokens per expert than the compute table measured: extrapolated")
        return loads.expert_us_WLG
    active_WLG = loads.active_WLG
    mean_WLG = loads.tokens_WLG / np.maximum(active_WLG, 1)
    each_us, outside = interpolate(mean_WLG, profile.expert_table_tokens, profile.expert_table_us)
    if outside:
        notes.append("more tokens per expert than the compute table measured: extrapolated")
    return np.where(active_WLG > 0, active_WLG * each_us, 0.0)


# ---- exchange ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Exchange:
    whole_us: FloatArray      # [W, L] the longer tier
    inter_us: FloatArray      # between nodes; the whole exchange where there is one node
    intra_us: FloatArray
    fixed_us: float           # start of one exchange
    port: IntArray            # [W, L]


def _exchange(
    loads: StepLoads,
    model: ModelSpec,
    cluster: Cluster,
    profile: ExchangeProfile,
    bytes_per_value: float,
    mirrored: bool,
    nic_share_G: FloatArray | None,
    notes: list[str],
) -> _Exchange:
    """One all-to-all of every step and layer; `mirrored` swaps out and in (the combine)."""
    shape = loads.tokens_WLG.shape[:2]
    zero = np.zeros(shape)
    if cluster.num_devices == 1 or (mirrored and cluster.traffic.mode == "coherent"):
        return _Exchange(zero, zero, zero, 0.0, np.full(shape, -1, np.int64))
    assert model.hidden is not None
    copy_bytes = model.hidden * bytes_per_value
    alpha_us = profile.alpha_us + profile.alpha_per_log2_node_us * np.log2(cluster.num_nodes)
    fair_us = np.zeros(shape)
    if loads.fair_transfers_WLX is not None:
        nic_us = copy_bytes / profile.nic_bytes_per_s * 1e6
        fair_us = loads.fair_transfers_WLX[:, :, int(mirrored)] * nic_us
    if shares_a_spine(profile, cluster) and (
        loads.fair_transfers_WLX is None or nic_share_G is not None
    ):
        notes.append(SHARED_SPINE)
    port_us = _port_times(loads, cluster, profile, copy_bytes, mirrored, nic_share_G)
    near_ports = 2 * cluster.num_devices
    near_WLP, far_WLP = port_us[:, :, :near_ports], port_us[:, :, near_ports:]
    if profile.table_bytes:
        most_bytes = near_WLP.max(axis=2) * profile.nvlink_bytes_per_s / 1e6
        intra_us, outside = interpolate(most_bytes, profile.table_bytes, profile.table_us)
        if outside:
            notes.append("more bytes per port than the exchange table measured: extrapolated")
    else:
        intra_us = alpha_us + near_WLP.max(axis=2)
    if cluster.num_nodes == 1:
        whole_us, inter_us, intra_us = intra_us, intra_us, zero
    else:
        inter_us = alpha_us + np.maximum(far_WLP.max(axis=2), fair_us)
        whole_us = np.maximum(inter_us, intra_us)
    port = np.argmax(port_us, axis=2)
    port = np.where(port_us.max(axis=2) > 0, port, -1)
    return _Exchange(whole_us, inter_us, intra_us, float(alpha_us), port)


def _port_times(
    loads: StepLoads,
    cluster: Cluster,
    profile: ExchangeProfile,
    copy_bytes: float,
    mirrored: bool,
    nic_share_G: FloatArray | None,
) -> FloatArray:
    """[W, L, ports] microseconds each port is busy; port index = kind·G + device or node."""
    nv_out, nv_in = loads.nvlink_out_WLG, loads.nvlink_in_WLG
    nic_out, nic_in = loads.nic_out_WLG, loads.nic_in_WLG
    if mirrored:
        nv_out, nv_in, nic_out, nic_in = nv_in, nv_out, nic_in, nic_out
    near_us = copy_bytes / profile.nvlink_bytes_per_s * 1e6
    left_G = np.ones(cluster.num_devices) if nic_share_G is None else nic_share_G
    far_us_G = copy_bytes / (profile.nic_bytes_per_s * left_G) * 1e6
    parts = [nv_out * near_us, nv_in * near_us, nic_out * far_us_G, nic_in * far_us_G]
    if profile.spine_bytes_per_s is not None:
        spine_us = copy_bytes / profile.spine_bytes_per_s * 1e6
        first_N = np.flatnonzero(np.diff(cluster.node_G, prepend=-1))
        parts.append(_pad(np.add.reduceat(nic_out, first_N, axis=2) * spine_us, nic_out.shape))
        parts.append(_pad(np.add.reduceat(nic_in, first_N, axis=2) * spine_us, nic_in.shape))
    return np.concatenate(parts, axis=2)


def _pad(node_WLN: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Nodes in the first places of a G-wide row, so that kind·G + node names the spine."""
    padded = np.zeros(shape)
    padded[:, :, : node_WLN.shape[2]] = node_WLN
    return padded


# ---- moving experts ---------------------------------------------------------------------------

HOST = -1


@dataclass(frozen=True, eq=False)
class MoveCost:
    """What a list of moves sends, and the port-bound time of sending it at once.

    source: the device each move is read from, HOST where no device that is left holds the expert.
    """

    moves: int
    bytes: int
    us: float
    source: tuple[int, ...]
    nvlink_out_bytes_G: FloatArray
    nvlink_in_bytes_G: FloatArray
    nic_out_bytes_G: FloatArray
    nic_in_bytes_G: FloatArray
    host_bytes_G: FloatArray

    @property
    def seconds(self) -> float:
        return self.us / 1e6


def move_cost(
    moves: Sequence[tuple[int, int, int]],
    current: Plan,
    model: ModelSpec,
    cluster: Cluster,
    *,
    unavailable: Collection[int] = (),
) -> MoveCost:
    """Price moves (layer, device, expert): that device receives that expert's weights.

    Source of a move: a holder in the receiver's node, else any holder; among those the one that
    has sent fewest bytes so far, ties to the lowest device. `unavailable` devices send nothing;
    an expert that nobody else holds is loaded from the receiver's host memory.
    Raises InputError for a move outside the plan.
    """
    bytes_E = model.bytes_per_expert_E()
    holds_LGE = current.replicas_LGE() > 0
    node_G = cluster.node_G
    devices = cluster.num_devices
    sums = np.zeros((5, devices))     # NVLink out, in, NIC out, in, host
    sent_G = np.zeros(devices)
    able_G = ~np.isin(np.arange(devices), np.fromiter(unavailable, np.int64))
    source: list[int] = []
    for layer, device, expert in moves:
        if not (0 <= layer < current.num_layers and 0 <= device < devices
                and 0 <= expert < current.num_experts):
            raise InputError(
                f"move (layer {layer}, device {device}, expert {expert}) is outside the plan's "
                f"{current.num_layers} layers, {devices} devices, {current.num_experts} experts"
            )
        size = float(bytes_E[expert])
        holders = np.flatnonzero(holds_LGE[layer, :, expert] & able_G)
        near = holders[node_G[holders] == node_G[device]]
        pool = near if len(near) else holders
        if not len(pool):
            source.append(HOST)
            sums[4, device] += size
            continue
        chosen = int(pool[np.argmin(sent_G[pool])])
        source.append(chosen)
        if chosen == device:
            continue
        sent_G[chosen] += size
        tier = 0 if len(near) else 2
        sums[tier, chosen] += size
        sums[tier + 1, device] += size
    return _priced(moves, sums, tuple(source), cluster)


def _priced(
    moves: Sequence[Any], sums: FloatArray, source: tuple[int, ...], cluster: Cluster
) -> MoveCost:
    hardware = cluster.hardware
    rates = [hardware.dispatch.nvlink_bytes_per_s] * 2 + [hardware.dispatch.nic_bytes_per_s] * 2
    seconds = max(
        float((sums[i] / rate).max())
        for i, rate in enumerate([*rates, hardware.host_to_device_bytes_per_s])
    )
    if hardware.dispatch.spine_bytes_per_s is not None:
        first_N = np.flatnonzero(np.diff(cluster.node_G, prepend=-1))
        for row in (sums[2], sums[3]):
            most = float(np.add.reduceat(row, first_N).max())
            seconds = max(seconds, most / hardware.dispatch.spine_bytes_per_s)
    return MoveCost(
        moves=len(moves), bytes=int(sums[0].sum() + sums[2].sum() + sums[4].sum()),
        us=seconds * 1e6, source=source, nvlink_out_bytes_G=sums[0], nvlink_in_bytes_G=sums[1],
        nic_out_bytes_G=sums[2], nic_in_bytes_G=sums[3], host_bytes_G=sums[4],
    )
