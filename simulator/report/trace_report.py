"""The report of `trace info`: what a trace holds, and whether it is long enough."""

from __future__ import annotations

import numpy as np

from ...foundation.units import digits
from ...traces.analysis.summary import TraceInfo
from .report import Picture, Report, Table


def trace_report(facts: TraceInfo) -> Report:
    """Learning curve first, where there is one; then what the layers look like."""
    facts_of = (
        ("format", facts.format), ("model", facts.model_name or "-"),
        ("tokens", f"{facts.tokens:,}"), ("layers", f"{facts.layers:,}"),
        ("experts per layer", f"{facts.experts:,}"), ("experts per token", f"{facts.top_k:,}"),
        ("requests", "-" if facts.requests is None else f"{facts.requests:,}"),
        ("home ranks", "-" if facts.source_ranks is None else f"{facts.source_ranks:,}"),
        ("recorded steps", "-" if facts.recorded_steps is None else f"{facts.recorded_steps:,}"),
        ("noise floor of the loads", "-" if facts.floor_bits is None
         else f"{digits(facts.floor_bits)} bits"),
    )
    tables = [Table("What it holds", ("", "value"), facts_of)]
    for title, counts in (("Tokens by phase", facts.tokens_by_phase),
                          ("Tokens by domain", facts.tokens_by_domain)):
        if counts:
            tables.append(Table(title, ("", "tokens"), tuple(
                (name, f"{n:,}") for name, n in counts.items()), folded=len(counts) > 12))
    return Report(
        title="Trace", verdict=facts.verdict, tables=tuple(tables),
        notes=(*(f"the format does not tell {what}" for what in facts.cannot_tell), *facts.notes),
        document=facts.to_dict(), draw=lambda: _pictures(facts),
    )


def _pictures(facts: TraceInfo) -> tuple[Picture, ...]:
    from .charts.layer_skew import layer_skew
    from .charts.learning import learning

    skew = Picture("skew", "How uneven each layer is", (layer_skew(np.array(facts.skew_L)),),
                   "The hottest expert's load over the mean expert's.")
    if facts.curve is None:
        return (skew,)
    return (Picture(
        "learning", "Is it long enough", (learning(facts.curve),),
        f"Judged by {facts.curve.judged_by}; the band is one standard deviation over random "
        "halves of the requests.",
    ), skew)
