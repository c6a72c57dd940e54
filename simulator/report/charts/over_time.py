"""A figure over time, with what happened marked: switches, faults, decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np

from ....foundation.arrays import FloatArray
from .theme import HEIGHT, Drawing, colours, inline

MOST_POINTS = 400            # of each line; more are averaged in stretches


@dataclass(frozen=True)
class Mark:
    """Something that happened."""

    at: float
    kind: str
    detail: str = ""


def over_time(
    lines: Mapping[str, tuple[FloatArray, FloatArray]], marks: Sequence[Mark], *,
    x: str, y: str,
) -> Drawing:
    """lines: name -> (when, value), rising in time. x, y: axis titles with their units."""
    names = list(lines)
    thinned = {name: _thinned(at, value) for name, (at, value) in lines.items()}
    data = inline({
        "name": [n for n, (at, _) in thinned.items() for _ in at],
        "at": np.concatenate([at for at, _ in thinned.values()]),
        "value": np.concatenate([value for _, value in thinned.values()]),
    })
    line = alt.Chart(data).mark_line(interpolate="step-after").encode(
        alt.X("at:Q", title=x, scale=alt.Scale(zero=False, nice=False)),
        alt.Y("value:Q", title=y, scale=alt.Scale(zero=False)),
        alt.Color("name:N", scale=colours(names), title=None,
                  legend=alt.Legend(orient="bottom") if len(names) > 1 else None),
        tooltip=["name:N", alt.Tooltip("at:Q", title=x, format=",.4~r"),
                 alt.Tooltip("value:Q", title=y, format=",.4~r")],
    )
    if not marks:
        return alt.layer(line).properties(width="container", height=HEIGHT)
    happened = alt.Chart(inline({
        "at": [m.at for m in marks], "kind": [m.kind for m in marks],
        "detail": [m.detail for m in marks],
    })).encode(x="at:Q", tooltip=[alt.Tooltip("at:Q", title=x, format=",.4~r"), "kind:N",
                                  "detail:N"])
    kinds = list(dict.fromkeys(m.kind for m in marks))
    point = happened.mark_point(filled=True, size=70, yOffset=-6).encode(
        y=alt.value(0), shape=alt.Shape("kind:N", title=None, scale=alt.Scale(domain=kinds),
                                        legend=alt.Legend(orient="bottom")),
    )
    rule = happened.mark_rule(strokeDash=[3, 3], opacity=0.7)
    return alt.layer(line, rule, point).properties(width="container", height=HEIGHT)


def _thinned(at: FloatArray, value: FloatArray) -> tuple[FloatArray, FloatArray]:
    if len(at) <= MOST_POINTS:
        return at, value
    first = np.linspace(0, len(at), MOST_POINTS + 1).astype(np.int64)[:-1]
    count = np.diff(np.append(first, len(at)))
    return at[first], np.add.reduceat(value, first) / count
