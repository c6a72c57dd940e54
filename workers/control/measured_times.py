"""What live steps say about time: this machine's expert times; what a switch stalls, costs, gains.

Knows measured steps and their trace. Knows nothing of when to look or what to switch to.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...placement.cluster import Cluster
from ...placement.plan import Plan
from ...placement.rebalancing.proposal import Promise, unsteadiness
from ...traces.model_spec import ModelSpec
from ..calibrate.expert_fit import (
    ExpertFit,
    critical_path_us_W,
    fit_kernel,
    machine,
    scale_to_live,
)
from ..coordinator.step_log import Measurements
from ..protocol.phase_plans import PhasePlans
from ..protocol.plan_switch import ApplyReport
from .traffic_window import Window

_FACTORS = 16      # windows whose speeds are kept
# A switch's price until one has been measured: an expert of any size costs its messages, its hash
# and its place in a round (2.4 ms on ranks that share two cores), and each byte 1 GB/s.
_EXPERT_US, _BYTE_US = 2000.0, 1e-3


@dataclass(frozen=True)
class LivePromise(Promise[PhasePlans]):
    """A switch of a live group that was made and is not yet judged."""

    phase: int | None         # whose steps were to gain; None: all
    cluster: Cluster          # with the times measured before the switch

    def kept_us(self, live: Window, model: ModelSpec) -> float:
        """The critical path of a step, had the plan before stayed: of the same tokens, by the
        times measured under it."""
        before = self.before.prefill if self.phase is None else self.before.of(self.phase)
        return float(critical_path_us_W(before, live.trace, self.cluster, model).mean())


@dataclass(frozen=True)
class MovePrice:
    """What serving feels of moving experts, as the last switch showed it."""

    factor: float = 1.0

    def us(self, moves: int, move_bytes: float) -> float:
        """Time that steps lose to a switch of so many experts."""
        return self.factor * (moves * _EXPERT_US + move_bytes * _BYTE_US)

    def learned(self, moves: int, move_bytes: float, felt_us: float) -> MovePrice:
        """The price that makes this switch cost what was felt of it."""
        expected = MovePrice().us(moves, move_bytes)
        return MovePrice(felt_us / expected) if expected and felt_us else self


class LiveTimes:
    """The cluster with expert times as live steps show them."""

    def __init__(self, model: ModelSpec, cluster: Cluster, kernel: ExpertFit | None) -> None:
        """kernel: how long experts take here; None = timed at the first measurement."""
        self._model, self._kernel = model, kernel
        self._given = cluster
        self.cluster = cluster
        self.measured = False
        self.error = 0.0          # relative: of the fit, and from one window to the next
        self._factors: dict[int | None, list[float]] = {}      # by phase; they differ in speed

    def adapt(self, cluster: Cluster) -> bool:
        """Take over other devices; whether their number changed, so that times are unknown."""
        if cluster.devices == self.cluster.devices:
            return False
        changed = cluster.num_devices != self.cluster.num_devices
        hardware = self._given.hardware if changed else self.cluster.hardware
        self.cluster = cluster.model_copy(update={"hardware": hardware})
        self.measured = self.measured and not changed
        if changed:
            self._factors = {}
        return changed

    def measure(self, live: Window, plan: Plan, phase: int | None = None) -> float:
        """Fit the times to steps (of one phase) served under this plan; their relative error."""
        if self._kernel is None:
            self._kernel = fit_kernel(self._model)
        fit = scale_to_live(
            self._kernel, live.measured, live.trace, plan, self.cluster, self._model
        )
        hardware = machine(fit, self.cluster.hardware)
        self.cluster = self.cluster.model_copy(update={"hardware": hardware})
        factors = [*self._factors.get(phase, ()), fit.live_factor][-_FACTORS:]
        self._factors[phase] = factors
        self.measured = True
        self.error = fit.live_error + unsteadiness(factors)
        return self.error


def stalls(steps: Measurements, report: ApplyReport) -> dict[str, float]:
    """What serving felt of a switch.

    stage_us: spent on moving experts and switching tables inside steps that served, the slowest
    rank of each. staging_us: the same, or the wall time of all staging where nothing was served
    meanwhile. commit_us: reading what arrived once more, while no step ran. commit_step_us: the
    whole step that switched.
    """
    carried = steps.take(steps.staging)      # not those served while the plan was looked for
    felt_us = float(carried.stage_us.max(axis=1, initial=0.0).sum())
    return {
        "stage_us": felt_us,
        "staging_us": felt_us or report.stage_us,
        "commit_us": report.verify_us,
        "commit_step_us": report.commit_us,
    }
