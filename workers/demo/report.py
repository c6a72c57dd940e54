"""What the demo leaves in its run folder: trace, plans, cluster, summary and report.

Knows the demo's figures and files. Measures nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ...placement.cluster import Cluster
from ...placement.plan import Plan
from ...simulator.report.page import Table, render_report, write_report
from ...simulator.report.views import plan_views
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
    page = render_report(
        title="Loadmaster demo", verdict=result.verdict, results=result.simulated,
        views=plan_views(plans, judged, cluster, steps=RECORDED),
        tables=[
            _table("Prefill", result.before, result.predicted, result.measured),
            _table("Decode", result.decode_before, result.decode_predicted,
                   result.decode_measured),
        ],
        notes=(result.decode_verdict,
               "loads and traffic: the recorded steps replayed under each plan"),
    )
    write_report(folder / "report.html", page)


def _table(title: str, *columns: Figures) -> Table:
    rows = tuple(
        (name.replace("_", " "), *("-" if v is None else f"{v:,.3f}" for v in values))
        for name, *values in ((n, *(getattr(c, n) for c in columns)) for n in vars(columns[0]))
    )
    return Table(title, ("", "before", "predicted", "measured"), rows)
