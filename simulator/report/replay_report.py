"""The report of `replay`: a run's own steps under each plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...foundation.units import change, duration
from ..serving.replay import Replay, ReplayedPlan
from .blame_parts import blame_table, layer_picture, layer_tables, time_picture
from .compared_parts import compared_spread, judged_on
from .report import Picture, Report, Table


def replay_report(played: Replay, notes: Sequence[str] = ()) -> Report:
    """Plans best first; the clock of each over the same steps."""
    table = played.comparison
    ranked = {row.name: played.plans[row.name] for row in table.rows}
    blames = {name: p.blame for name, p in ranked.items()}
    header = ("plan", "step, mean", f"against {table.reference}", "p99", "all steps",
              "request, mean", "p50", "p99")
    rows = tuple(
        (row.name, duration(p.step_time.mean),
         "-" if row.name == table.reference else change(
             row.change_percent, row.change_low_percent, row.change_high_percent),
         duration(p.step_time.p99), duration(p.total_us), duration(p.latency.mean),
         duration(p.latency.p50), duration(p.latency.p99))
        for row, p in zip(table.rows, ranked.values(), strict=True)
    )
    own = (*played.notes, *table.notes, *(n for p in ranked.values() for n in p.notes))
    return Report(
        title="Replay", verdict=table.verdict,
        tables=(Table("The clock of each plan; a request lasts from its first step to its last",
                      header, rows),
                blame_table(blames), *layer_tables(blames)),
        judged_on=judged_on(table), notes=tuple(dict.fromkeys((*notes, *own))),
        document={"verdict": table.verdict} | played.to_dict() | {"notes": [*notes, *own]},
        draw=lambda: (compared_spread(table), time_picture(blames), _clock(ranked),
                      layer_picture(blames)),
    )


def _clock(ranked: Mapping[str, ReplayedPlan]) -> Picture:
    from .charts.over_time import over_time

    lines = {name: (np.arange(len(p.step_us), dtype=np.float64), p.step_us / 1e3)
             for name, p in ranked.items()}
    return Picture("clock", "Step time, step by step",
                   (over_time(lines, (), x="step", y="step time, ms"),))
