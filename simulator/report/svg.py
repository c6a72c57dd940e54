"""Small pictures as SVG text: heat maps, stacked bars, distribution curves.

Knows numbers and colours. Knows nothing of plans or files. No scripts, no fonts, nothing fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from ...foundation.arrays import FloatArray

MOST_CELLS = 64          # of a side; more are averaged together
COLOURS = ("#3b6ea5", "#d98032", "#c8553d", "#7a9e48", "#8d8d99", "#6b5b95")
COLD, MIDDLE, HOT = (49, 104, 163), (247, 247, 247), (190, 49, 38)


def heat_map(
    values: FloatArray, *, rows: str, columns: str, middle: float, highest: float,
    title: str,
) -> str:
    """A grid of coloured cells: `middle` is white, 0 blue, `highest` and above red.

    Sides longer than 64 are averaged in blocks, and the caption notes it.
    """
    grid, blocks = _blocks(values)
    size = max(4, min(16, 640 // max(grid.shape)))
    height, width = grid.shape[0] * size, grid.shape[1] * size
    cells = []
    for r, row in enumerate(grid):
        for c, value in enumerate(row):
            colour = _colour(float(value), middle, highest)
            cells.append(
                f'<rect x="{c * size}" y="{r * size}" width="{size}" height="{size}" '
                f'fill="{colour}"><title>{escape(rows)} {r * blocks[0]}, {escape(columns)} '
                f"{c * blocks[1]}: {value:.3g}</title></rect>"
            )
    merged = "" if blocks == (1, 1) else f", {blocks[0]} x {blocks[1]} averaged per cell"
    caption = (
        f"{title}: {rows} down ({values.shape[0]}), {columns} across ({values.shape[1]}){merged}. "
        f"Mean {np.nanmean(values):.3g}, highest {np.nanmax(values):.3g}"
    )
    return _figure(width, height, "".join(cells), caption)


def stacked_bars(parts: Mapping[str, Mapping[str, float]], *, title: str) -> str:
    """One bar per name; its parts side by side in their order, scaled to the longest bar."""
    names = list(dict.fromkeys(part for row in parts.values() for part in row))
    longest = max((sum(max(v, 0.0) for v in row.values()) for row in parts.values()), default=1.0)
    shapes, y = [], 0
    for name, row in parts.items():
        x = 150.0
        shapes.append(f'<text x="0" y="{y + 15}">{escape(name)}</text>')
        for part, value in row.items():
            width = 480.0 * max(value, 0.0) / (longest or 1.0)
            colour = COLOURS[names.index(part) % len(COLOURS)]
            shapes.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="17" fill="{colour}">'
                f"<title>{escape(part)}: {value:.4g}</title></rect>"
            )
            x += width
        y += 26
    for i, part in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        shapes.append(f'<rect x="{150 + 100 * i}" y="{y + 4}" width="11" height="11" '
                      f'fill="{colour}"/>')
        shapes.append(f'<text x="{166 + 100 * i}" y="{y + 14}">{escape(part)}</text>')
    return _figure(150 + max(490, 100 * len(names)), y + 24, "".join(shapes), title)


def distribution_curves(samples: Mapping[str, FloatArray], *, title: str, unit: str) -> str:
    """Share of samples below a value, one line per name, up to the 99.5th percentile of all."""
    pooled = np.concatenate([np.asarray(s, np.float64) for s in samples.values()])
    most = float(np.quantile(pooled, 0.995)) or 1.0
    width, height = 560, 200
    shapes = [f'<path d="M40 0V{height}H{width + 40}" fill="none" stroke="#999"/>']
    for i, (name, values) in enumerate(samples.items()):
        share = np.linspace(0.0, 1.0, 101)
        at = np.minimum(np.quantile(np.asarray(values, np.float64), share) / most, 1.0)
        points = " ".join(
            f"{40 + width * x:.1f},{height * (1 - s):.1f}" for x, s in zip(at, share, strict=True)
        )
        colour = COLOURS[i % len(COLOURS)]
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                      f'stroke-width="2"/>')
        shapes.append(f'<text x="{width - 90}" y="{30 + 16 * i}" fill="{colour}">'
                      f"{escape(name)}</text>")
    shapes.append(f'<text x="40" y="{height + 16}">0</text>')
    shapes.append(f'<text x="{width - 20}" y="{height + 16}">{most:.4g} {escape(unit)}</text>')
    return _figure(width + 60, height + 22, "".join(shapes), title)


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(width: int | float, height: int, inside: str, caption: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" '
        f'role="img">{inside}</svg><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _blocks(values: FloatArray) -> tuple[FloatArray, tuple[int, int]]:
    """Averages of blocks so that no side exceeds MOST_CELLS."""
    rows, columns = (-(-n // MOST_CELLS) for n in values.shape)
    if (rows, columns) == (1, 1):
        return values, (1, 1)
    starts = [np.arange(0, n, b) for n, b in zip(values.shape, (rows, columns), strict=True)]
    sums = np.add.reduceat(np.add.reduceat(values, starts[0], axis=0), starts[1], axis=1)
    counts = [
        np.diff(np.append(s, n)) for s, n in zip(starts, values.shape, strict=True)
    ]
    return sums / (counts[0][:, None] * counts[1]), (rows, columns)


def _colour(value: float, middle: float, highest: float) -> str:
    if not np.isfinite(value):
        return "#dddddd"
    if value >= middle:
        part = min(1.0, (value - middle) / max(highest - middle, 1e-12))
        ends = (MIDDLE, HOT)
    else:
        part = min(1.0, (middle - value) / max(middle, 1e-12))
        ends = (MIDDLE, COLD)
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(*ends, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
