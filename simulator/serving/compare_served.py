"""Several plans serve the same requests: every result, and which plan is better beyond the noise.

Knows plans, workloads and results. Knows nothing of how plans were made or how results are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import LoadmasterError, UsageError
from ...placement.cluster import Cluster
from ...placement.cost.evaluate import resolve_dispatch
from ...placement.plan import Plan
from ...traces.model_spec import ModelSpec
from ...traces.trace import RoutingTrace
from ..pricing.step_router import StepRouter
from .paired_difference import Paired, set_side_by_side
from .result import SimulationResult, Slo
from .simulate import Intervention, Serving, simulate
from .workload import Workload


@dataclass(frozen=True, eq=False)
class Served:
    """One result per plan, in the order given, and how they compare."""

    results: dict[str, SimulationResult]
    paired: Paired

    @property
    def verdict(self) -> str:
        """One sentence about mean latency; with one plan, what it served."""
        best = self.results[self.paired.best]
        return f"{self.paired.verdict()}; {best.output_tokens_per_s:,.0f} output tokens/s" + (
            f", {best.goodput_requests_per_s:.2f} requests/s within the limits"
            if best.goodput_requests_per_s is not None else ""
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the results and of the comparison, each once."""
        lines = (*self.paired.notes, *(n for r in self.results.values() for n in r.notes))
        return tuple(dict.fromkeys(lines))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "verdict": self.verdict,
            "paired": self.paired.to_dict(),
            "plans": {name: result.to_dict() for name, result in self.results.items()},
            "notes": list(self.notes),
        }


def serve_each(
    plans: Mapping[str, Plan],
    workload: Workload,
    cluster: Cluster,
    *,
    trace: RoutingTrace,
    model: ModelSpec,
    dispatch: str | None = None,
    serving: Serving | None = None,
    slo: Slo | None = None,
    interventions: Sequence[Intervention] = (),
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Served:
    """Serve the workload under each plan; `progress()` after each.

    dispatch: of all plans; None = each plan's own. All plans are checked before the first serves.
    Raises UsageError without plans, else as `simulate`, naming the plan where there are several.
    """
    if not plans:
        raise UsageError("name at least one plan to serve under")
    for name, plan in plans.items():
        with _named(name, plans):
            if dispatch is not None:
                resolve_dispatch(dispatch, plan)
            StepRouter(trace, cluster, model).check(plan)
    results = {}
    for name, plan in plans.items():
        with _named(name, plans):
            results[name] = simulate(
                plan, workload, cluster, trace=trace, model=model, dispatch=dispatch,
                serving=serving, slo=slo, interventions=interventions, seed=seed,
            )
        if progress is not None:
            progress()
    latency_us = {name: r.requests.latency_us for name, r in results.items()}
    in_flight = max(float(r.requests.latency_us.sum()) / r.duration_us for r in results.values())
    return Served(results, set_side_by_side(latency_us, in_flight, seed=seed))


@contextmanager
def _named(name: str, plans: Mapping[str, Plan]) -> Iterator[None]:
    """Say which plan an error is about, where there are several."""
    try:
        yield
    except LoadmasterError as error:
        if len(plans) == 1:
            raise
        raise type(error)(f"plan {name}: {error}") from error
