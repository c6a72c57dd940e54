"""The report of `evaluate`: plans side by side on a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...placement.cluster import Cluster
from ...placement.comparison.compare import Comparison
from .compared_parts import (
    VIEWED,
    compared_spread,
    compared_table,
    judged_on,
    load_picture,
    traffic_picture,
)
from .report import Picture, Report
from .views import PlanView


def evaluate_report(
    table: Comparison, views: Callable[[], Sequence[PlanView]], cluster: Cluster,
    notes: Sequence[str] = (),
) -> Report:
    """views: counts those of the plans to show (`shown_names`)."""
    return Report(
        title="Plans compared", verdict=table.verdict,
        tables=(compared_table(table, cluster.num_nodes),),
        judged_on=(*judged_on(table), VIEWED),
        notes=tuple(dict.fromkeys((*notes, *table.notes))),
        document=table.to_dict() | {"notes": [*notes, *table.notes]},
        draw=lambda: _pictures(table, views(), cluster),
    )


def _pictures(
    table: Comparison, views: Sequence[PlanView], cluster: Cluster
) -> tuple[Picture, ...]:
    return (compared_spread(table), load_picture(views),
            *([traffic_picture(views, cluster)] if cluster.num_devices > 1 else []))


def shown_names(table: Comparison) -> tuple[str, ...]:
    """The reference and the best other plan: two pictures can be compared, ten cannot."""
    others = [name for name in table.ranking if name != table.reference]
    return (table.reference, *others[:1])
