"""The report of `whatif`: every scenario, ranked, and the choices that nothing beats."""

from __future__ import annotations

from collections.abc import Sequence

from ...foundation.units import digits, duration, size
from ..whatif.resume import Cell
from ..whatif.run import WhatIf
from .report import Picture, Report, Table


def whatif_report(
    table: WhatIf, axes: Sequence[str], rank_by: str, notes: Sequence[str] = ()
) -> Report:
    """axes: the fields that scenarios differ in. rank_by: as the table was asked for."""
    ranked, front = table.ranked(rank_by), {id(c) for c in table.pareto()}
    verdict = "no scenario could be served"
    if ranked:
        best = ranked[0]
        verdict = f"best by {rank_by.replace('_', ' ')}: {scenario(best, axes)}, " + figure_text(
            rank_by, best.figures[rank_by]
        )
    shown = list(dict.fromkeys((rank_by, *(ranked[0].figures if ranked else ()))))
    rows = tuple(
        (*(str(c.fields[a]) for a in axes), *(figure_text(f, c.figures[f]) for f in shown),
         "yes" if id(c) in front else "")
        for c in ranked
    )
    header = (*axes, *(f.removesuffix("_us").replace("_", " ") for f in shown), "on the front")
    failed = tuple(
        (scenario(c, axes), c.error or "") for c in table.failed
    )
    return Report(
        title="What if", verdict=verdict,
        tables=(*([Table("Scenarios, best first", header, rows)] if rows else []),
                *([Table("Could not be served", ("scenario", "why"), failed)] if failed else [])),
        judged_on=("each scenario is planned on half of the trace's requests and served with the "
                   "routing of the others",),
        notes=tuple(dict.fromkeys((*notes, *table.notes))),
        document=table.to_dict() | {"notes": [*notes, *table.notes]},
        draw=lambda: (_front(ranked, axes, front),) if ranked else (),
    )


def _front(ranked: Sequence[Cell], axes: Sequence[str], front: set[int]) -> Picture:
    from .charts.pareto import Choice, pareto

    choices = [
        Choice(scenario(c, axes), float(c.figures["latency_mean_us"] or 0.0),
               float(c.figures["devices"] or 0.0),
               float(c.figures["expert_bytes_per_device"] or 0.0), id(c) in front)
        for c in ranked
    ]
    return Picture("front", "What each scenario costs and gives", (pareto(choices),),
                   "Latency, devices and memory together: what is in colour is beaten by no other.")


def scenario(cell: Cell, axes: Sequence[str]) -> str:
    """What sets it apart: `nodes 2, slots_per_device 5`."""
    return ", ".join(f"{a} {cell.fields[a]}" for a in axes) or "the base"


def figure_text(name: str, value: float | None) -> str:
    """In the unit its name says."""
    if name.endswith("_us"):
        return duration(value)
    return size(value) if "bytes" in name else digits(value)
