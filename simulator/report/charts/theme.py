"""What all pictures share: colours, sizes, and data small enough to travel inside a page.

Colours are Okabe and Ito's, distinct for every common colour vision, on light and dark paper.
Nothing here sets a text colour: the page does, for light, dark and print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import altair as alt
import numpy as np

Drawing = alt.Chart | alt.LayerChart | alt.FacetChart

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#777777")
DIVERGING: Final = "blueorange"
SEQUENTIAL: Final = "viridis"
HEIGHT = 260                 # pixels of a picture with one axis of numbers
ROW = 34                     # pixels of a plan's row in a bar chart


def inline(columns: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> alt.InlineData:
    """Columns as CSV, numbers of five digits: a third of the size of JSON objects."""
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns of different lengths: {sorted(lengths)}")
    rows = zip(*(map(_cell, np.asarray(c).tolist()) for c in columns.values()), strict=True)
    text = "\n".join([",".join(columns), *(",".join(row) for row in rows)])
    kinds = {
        name: "string" if any(isinstance(v, str) for v in np.asarray(c).tolist()) else "number"
        for name, c in columns.items()
    }
    return alt.InlineData(values=text, format=alt.CsvDataFormat(type="csv", parse=kinds))


def _cell(value: Any) -> str:
    if isinstance(value, str):
        quoted = value.replace('"', '""').replace("\n", " ")
        return f'"{quoted}"'
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def colours(names: Sequence[str]) -> alt.Scale:
    """A colour a name, in the order given."""
    taken = [PALETTE[i % len(PALETTE)] for i in range(len(names))]
    return alt.Scale(domain=list(names), range=taken)


def below() -> alt.Legend:
    """A colour bar under the picture, where a narrow page has room for it."""
    return alt.Legend(orient="bottom", direction="horizontal", gradientLength=180)
