"""The files that `simulate` writes. What may fail before serving is done before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .options import writing

if TYPE_CHECKING:
    from ..placement.cluster import Cluster
    from ..placement.plan import Plan
    from ..simulator.pricing.step_router import StepRouter
    from ..simulator.report.views import PlanView
    from ..simulator.serving.compare_served import Served
    from ..traces.trace import RoutingTrace


def views_of(
    plans: dict[str, Plan], routing: RoutingTrace, cluster: Cluster, dispatch: str | None
) -> list[PlanView]:
    """Each plan's loads and traffic, under the dispatch it serves with."""
    from ..placement.cost.evaluate import resolve_dispatch
    from ..simulator.report.views import plan_views

    return [
        view for name, plan in plans.items()
        for view in plan_views({name: plan}, routing, cluster,
                               dispatch=resolve_dispatch(dispatch, plan))
    ]


def write_page(path: Path, served: Served, views: list[PlanView]) -> None:
    """The HTML report."""
    from ..simulator.report.page import render_report, write_report

    page = render_report(
        title="Loadmaster simulation", verdict=served.verdict, results=served.results,
        views=views, notes=(
            "loads and traffic: steps of 512 tokens, 64 requests in flight, from the trace",
            *served.paired.notes,
        ),
    )
    with writing(path):
        write_report(path, page)


def write_timeline(path: Path, served: Served, name: str, plan: Plan, router: StepRouter) -> None:
    """The Chrome trace of one plan's run."""
    from ..simulator.report.chrome_trace import write_chrome_trace

    with writing(path):
        write_chrome_trace(path, served.results[name], plan, router)
