"""What steps made of given trace tokens cost under a plan, and in what condition of the devices.

The bridge from the event engine to floor 2: `step_loads` and `step_cost` answer inside a step.
Knows nothing of clocks or queues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from ...errors import InputError, UsageError
from ...foundation.arrays import FloatArray, IntArray
from ...foundation.parallel import LayerThreads, usable_cores
from ...placement.cluster import Cluster
from ...placement.cost.evaluate import check_model, check_slots
from ...placement.cost.overlap import Overlap
from ...placement.cost.step_cost import PORTS as COST_PORTS
from ...placement.cost.step_cost import step_cost
from ...placement.cost.step_loads import StepLoads, check_fit, step_loads
from ...placement.memory import require_plan_fits
from ...placement.plan import DispatchSpec, Plan
from ...traces.model_spec import ModelSpec
from ...traces.steps import Steps
from ...traces.trace import RoutingTrace
from .even_bulk import bulk_loads, counts_in_bulk
from .measured_range import below_measured
from .step_composition import Composition

PORTS = COST_PORTS[:4]    # of a device; spines are a node's
PORT_KINDS = len(COST_PORTS)
TOKENS_WORTH_THREADS = 4_096
_laid_out: WeakKeyDictionary[RoutingTrace, dict[str, RoutingTrace]] = WeakKeyDictionary()
MIRROR = [1, 0, 3, 2]      # the combine goes back through the other end


@dataclass(frozen=True, eq=False)
class Condition:
    """What is active while a step runs: the plan, and what is wrong with the devices.

    slowdown_G: >= 1, how many times as long a device computes. nic_share_G: in (0, 1], what is
    left of a device's network port. None = all well. lost: devices that neither compute nor serve.
    """

    plan: Plan
    slowdown_G: FloatArray | None = None
    nic_share_G: FloatArray | None = None
    lost: frozenset[int] = frozenset()

    def uncovered(self) -> int:
        """How many (layer, expert) have no replica on a device that is there."""
        replicas_LGE = self.plan.replicas_LGE()
        there_G = ~np.isin(np.arange(self.plan.num_devices), sorted(self.lost))
        return int((replicas_LGE[:, there_G].sum(axis=1) == 0).sum())


@dataclass(frozen=True, eq=False)
class RoutedSteps:
    """Times of N routed steps in microseconds. Axes: N steps, L layers, P ports, G devices."""

    step_us: FloatArray          # [N]
    layer_us: FloatArray         # [N, L] as the overlap schedule leaves it
    dispatch_us: FloatArray      # [N, L] the exchange itself
    combine_us: FloatArray       # [N, L]
    compute_us: npt.NDArray[np.float32]    # [N, L, G]
    port_us: FloatArray          # [N, P, G] busy time of each port, dispatch and combine together
    port_of_layer: IntArray      # [N, L] the port that sets the dispatch, as in StepCost
    imbalance: FloatArray        # [N, L] busiest device over mean; NaN = no token
    notes: tuple[str, ...] = ()  # what lies outside the measured tables


class StepRouter:
    """Routes steps of one trace on one cluster for one model.

    dispatch None: each plan's own. Raises UsageError when the model's sizes are unknown and
    InputError when plan, trace and cluster do not belong together.
    """

    def __init__(
        self,
        trace: RoutingTrace,
        cluster: Cluster,
        model: ModelSpec,
        *,
        dispatch: DispatchSpec | None = None,
        overlap: Overlap | None = None,
    ) -> None:
        if not model.knows_sizes:
            raise UsageError(
                f"{model.name}: {model.unsized}: a simulation needs times; give a ModelSpec that "
                "has the hidden and intermediate sizes and the bytes of a weight"
            )
        if (model.num_layers, model.num_experts) != (trace.num_layers, trace.num_experts):
            raise InputError(
                f"model: {model.num_layers} layers of {model.num_experts} experts, the trace has "
                f"{trace.num_layers} of {trace.num_experts}: they are of different models, or the "
                "trace holds some layers only, which `loadmaster evaluate --model` prices"
            )
        self.trace, self.cluster, self.model = trace, cluster, model
        self.dispatch, self.overlap = dispatch, overlap
        self.expert_bytes_E = model.bytes_per_expert_E()
        self._tokens_read = {"by token": 0, "by layer": 0}

    def check(self, plan: Plan) -> None:
        """Raises InputError when the plan is for another model or cluster, InfeasibleError when
        a device's memory cannot hold its experts.
        """
        check_fit(self.trace, plan, self.cluster)
        check_model(self.model, plan)
        check_slots(plan, self.cluster, "the plan")
        require_plan_fits(plan, self.cluster, self.model)

    def loads(
        self, steps: Sequence[Composition], plan: Plan, dispatch: DispatchSpec | None = None
    ) -> StepLoads:
        """Work and traffic of the steps, dispatched by `dispatch`, ours or the plan's own."""
        spec = dispatch or self.dispatch or plan.dispatch
        offset = np.concatenate(([0], np.cumsum([len(s.token) for s in steps]))).astype(np.int64)
        of_step = float(offset[-1]) / max(len(steps), 1) * self.trace.top_k
        if counts_in_bulk(spec, self.cluster, plan, of_step):
            return bulk_loads(
                self._trace_laid_out("by token", int(offset[-1])), steps, plan, self.cluster,
                expert_bytes_E=self.expert_bytes_E, threads=usable_cores(),
            )
        together = Steps(np.concatenate([s.token for s in steps]), offset)
        return step_loads(
            self._trace_laid_out("by layer", int(offset[-1])), together, plan, self.cluster, spec,
            expert_bytes_E=self.expert_bytes_E,
            home_A=np.concatenate([s.home for s in steps]),
            executor=LayerThreads() if offset[-1] >= TOKENS_WORTH_THREADS else None,
        )

    def _trace_laid_out(self, order: str, tokens: int) -> RoutingTrace:
        """The trace with its choices in the order of memory that is fast to read, once it pays.

        Bulk counting reads token by token, routing reads layer by layer, both at random places:
        in the other order up to ten times as slow. Once as many tokens were read as the trace has,
        a copy has paid. Routers of one trace share it; it goes with the trace.
        """
        self._tokens_read[order] += tokens
        laid_out = _laid_out.setdefault(self.trace, {})
        if order not in laid_out and self._tokens_read[order] > self.trace.num_tokens:
            # A view of the axes in the order they shall lie in, copied, seen as [T, L, K] again.
            axes = (0, 1, 2) if order == "by token" else (1, 0, 2)
            ids: Any = np.ascontiguousarray(self.trace.ids.transpose(axes)).transpose(axes)
            laid_out[order] = dataclasses.replace(self.trace, ids=ids)
        return laid_out.get(order, self.trace)

    def cost(
        self,
        steps: Sequence[Composition],
        condition: Condition,
        dispatch: DispatchSpec | None = None,
    ) -> RoutedSteps:
        """Route and price the steps."""
        spec = dispatch or self.dispatch or condition.plan.dispatch
        loads = self.loads(steps, condition.plan, spec)
        return self.price(loads, condition, spec)

    def price(self, loads: StepLoads, condition: Condition, spec: DispatchSpec) -> RoutedSteps:
        """Times of loads that are counted already."""
        cost = step_cost(
            loads, self.model, self.cluster, dispatch=spec, overlap=self.overlap,
            slowdown_G=condition.slowdown_G, nic_share_G=condition.nic_share_G,
        )
        if condition.nic_share_G is not None:
            # A port at a fraction of its rate is busy as if it carried more transfers.
            loads = dataclasses.replace(
                loads,
                nic_out_WLG=loads.nic_out_WLG / condition.nic_share_G,
                nic_in_WLG=loads.nic_in_WLG / condition.nic_share_G,
            )
        busy = loads.tokens_WLG / self.cluster.speed_G
        mean = busy.mean(axis=2)
        return RoutedSteps(
            cost.step_us_W, cost.layer_us_WL, cost.dispatch_us_WL, cost.combine_us_WL,
            cost.compute_us_WLG.astype(np.float32),
            port_times(loads, self.model, self.cluster), cost.dispatch_port_WL,
            busy.max(axis=2) / np.where(mean > 0, mean, np.nan),
            (*cost.notes, *below_measured(loads, self.model, self.cluster)),
        )


def port_times(loads: StepLoads, model: ModelSpec, cluster: Cluster) -> FloatArray:
    """[N, P, G] microseconds each device's port is busy over all layers, dispatch and combine."""
    to_P, back_P = copy_us(model, cluster)
    transfers = port_transfers(loads).sum(axis=2)
    us: FloatArray = transfers * to_P[:, None, None] + transfers[MIRROR] * back_P[:, None, None]
    return us.transpose(1, 0, 2)


def port_transfers(loads: StepLoads) -> FloatArray:
    """[P, N, L, G] token transfers through each port in the dispatch direction."""
    return np.stack(
        [loads.nvlink_out_WLG, loads.nvlink_in_WLG, loads.nic_out_WLG, loads.nic_in_WLG]
    )


def copy_us(model: ModelSpec, cluster: Cluster) -> tuple[FloatArray, FloatArray]:
    """([P], [P]) microseconds of one copy on each port: dispatched, and combined on its mirror."""
    hardware, hidden = cluster.hardware, model.hidden or 0
    to, back = hardware.dispatch, hardware.combine
    to_P = np.repeat([to.nvlink_bytes_per_s, to.nic_bytes_per_s], 2)
    back_P = np.repeat([back.nvlink_bytes_per_s, back.nic_bytes_per_s], 2)
    combined = 0.0 if cluster.traffic.mode == "coherent" else hardware.combine_bytes_per_value
    return (
        hidden * hardware.dispatch_bytes_per_value * 1e6 / to_P, hidden * combined * 1e6 / back_P
    )
