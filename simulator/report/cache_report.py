"""The report of `cache`: which policy keeps the right experts."""

from __future__ import annotations

from collections.abc import Sequence

from ...foundation.units import duration, percent
from ..cache.compare import CacheTable
from .report import Picture, Report, Table


def cache_report(table: CacheTable, notes: Sequence[str] = ()) -> Report:
    """Policies by stall, least first."""
    figures = [(row.name, row.figures) for row in table.rows]
    header = ("policy", "hits", "stall a step", "step", "stalled", "loads", "guessed right",
              "loaded in vain")
    rows = tuple(
        (name, percent(r.hit_rate), duration(r.stall_us / r.steps), duration(r.step_us),
         percent(r.stall_us / (r.stall_us + r.compute_us)), f"{r.loads:,}", f"{r.prefetched:,}",
         f"{r.wasted:,}")
        for name, r in figures
    )
    where = "all layers together" if table.tier.shared else "each layer"
    return Report(
        title="Expert cache", verdict=table.verdict,
        tables=(Table("Policies, least stall first", header, rows),),
        judged_on=(f"{table.steps} steps; {table.tier.slots} slots in {where}; a load takes "
                   f"{duration(table.tier.load_us)}",),
        notes=tuple(dict.fromkeys((*notes, *table.notes))),
        document=table.to_dict() | {"notes": [*notes, *table.notes]},
        draw=lambda: (_stalls(table),),
    )


def _stalls(table: CacheTable) -> Picture:
    from .charts.cache_stalls import cache_stalls

    figures = [(row.name, row.figures) for row in table.rows]
    return Picture("stalls", "What a step computes, and what it waits for", (cache_stalls([
        (name, r.compute_us / r.steps, r.stall_us / r.steps, r.hit_rate) for name, r in figures
    ]),))
