"""What the demo leaves in its run folder: trace, plans, cluster, summary and report.

Knows the demo's figures and files. Measures nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...placement.cluster import Cluster
from ...placement.plan import Plan
from ...simulator.report.blame_parts import blame_table, layer_tables, time_picture
from ...simulator.report.compared_parts import load_picture, traffic_picture
from ...simulator.report.page import write_page
from ...simulator.report.report import Report, Table
from ...simulator.report.simulate_report import latency_picture
from ...simulator.report.views import PlanView, plan_views
from ...traces.steps import RECORDED
from ...traces.storage.store import save_trace
from ...traces.trace import RoutingTrace
from .measure import Figures

if TYPE_CHECKING:
    from .result import DemoResult


def leave(
    result: DemoResult, folder: Path, recorded: RoutingTrace, judged: RoutingTrace,
    plans: dict[str, Plan], cluster: Cluster,
) -> None:
    """The run folder: trace, plans, cluster, summary and report."""
    save_trace(recorded, folder / "trace")
    for name, made in plans.items():
        made.save(folder / f"{name}.plan.json")
    (folder / "cluster.yaml").write_text(cluster.to_yaml(), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(result.to_dict(), indent=2), encoding="utf-8")
    write_page(folder / "report.html", demo_report(
        result, plan_views(plans, judged, cluster, steps=RECORDED), cluster,
    ))


def demo_report(result: DemoResult, views: list[PlanView], cluster: Cluster) -> Report:
    """Before, predicted, measured; then the same requests simulated under both plans."""
    blames = {name: run.blame for name, run in result.simulated.items()}
    return Report(
        title="Loadmaster demo", verdict=result.verdict,
        tables=(
            _table("Prefill", result.before, result.predicted, result.measured),
            _table("Decode", result.decode_before, result.decode_predicted,
                   result.decode_measured),
            blame_table(blames), *layer_tables(blames),
        ),
        judged_on=("measured in turns: the same prompts under each plan, plans switched live",
                   "loads and traffic: the recorded steps replayed under each plan"),
        notes=tuple(dict.fromkeys((
            result.decode_verdict, *(n for r in result.simulated.values() for n in r.notes),
        ))),
        document=result.to_dict(),
        draw=lambda: (load_picture(views), latency_picture(result.simulated),
                      time_picture(blames), traffic_picture(views, cluster)),
    )


def _table(title: str, *columns: Figures) -> Table:
    rows = tuple(
        (name.replace("_", " "), *("-" if v is None else f"{v:,.3f}" for v in values))
        for name, *values in ((n, *(getattr(c, n) for c in columns)) for n in vars(columns[0]))
    )
    return Table(title, ("", "before", "predicted", "measured"), rows)
