"""Expert caches: what a step computes and what it waits for loads, policy by policy."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from .theme import ROW, Drawing, colours, inline

PARTS = ("computing", "waiting for experts")


def cache_stalls(rows: Sequence[tuple[str, float, float, float]]) -> Drawing:
    """rows: (policy, compute us a step, stall us a step, hit rate)."""
    names = [name for name, *_ in rows]
    data = inline({
        "policy": [n for n in names for _ in PARTS], "part": [p for _ in names for p in PARTS],
        "ms": [us / 1e3 for _, compute, stall, _ in rows for us in (compute, stall)],
        "hits": [hits for *_, hits in rows for _ in PARTS],
    })
    return (
        alt.Chart(data)
        .mark_bar()
        .encode(
            alt.X("ms:Q", title="milliseconds of a mean step", stack="zero"),
            alt.Y("policy:N", sort=names, title=None),
            alt.Color("part:N", scale=colours(PARTS), title=None,
                      legend=alt.Legend(orient="bottom")),
            tooltip=["policy:N", "part:N", alt.Tooltip("ms:Q", format=",.4~r"),
                     alt.Tooltip("hits:Q", format=".1%")],
        )
        .properties(width="container", height=ROW * max(len(names), 1))
    )
