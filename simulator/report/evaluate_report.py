"""The report of `evaluate`: plans side by side on a trace."""

from __future__ import annotations

from collections.abc import Sequence

from ...placement.cluster import Cluster
from ...placement.comparison.compare import Comparison
from .compared_parts import (
    compared_spread,
    compared_table,
    judged_on,
    load_picture,
    traffic_picture,
)
from .report import Report
from .views import PlanView


def evaluate_report(
    table: Comparison, views: Sequence[PlanView], cluster: Cluster, notes: Sequence[str] = ()
) -> Report:
    """views: of the plans to show, the reference first."""
    return Report(
        title="Plans compared", verdict=table.verdict, lead=compared_spread(table),
        tables=(compared_table(table, cluster.num_nodes),),
        pictures=(load_picture(views),
                  *([traffic_picture(views, cluster)] if cluster.num_devices > 1 else [])),
        judged_on=(*judged_on(table),
                   "loads and traffic: up to 16 steps spread evenly over the trace"),
        notes=tuple(dict.fromkeys((*notes, *table.notes))),
        document=table.to_dict() | {"notes": [*notes, *table.notes]},
    )


def shown_names(table: Comparison) -> tuple[str, ...]:
    """The reference and the best other plan: two pictures can be compared, ten cannot."""
    others = [name for name in table.ranking if name != table.reference]
    return (table.reference, *others[:1])
