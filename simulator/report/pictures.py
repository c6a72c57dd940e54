"""A report's pictures as image files, for a slide or an issue."""

from __future__ import annotations

from pathlib import Path

import altair as alt

from ...errors import LoadmasterError
from .report import Picture, Report

WIDTH, SCALE = 520, 2.0      # pixels of each chart; the files are twice as fine


def write_pictures(folder: str | Path, report: Report) -> list[Path]:
    """One PNG a picture, named by it, in a folder made if absent. Raises LoadmasterError."""
    import vl_convert

    folder = Path(folder)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in report.draw():
            path = folder / f"{picture.name}.png"
            image = vl_convert.vegalite_to_png(_side_by_side(picture), scale=SCALE)
            path.write_bytes(image)
            written.append(path)
    except OSError as error:
        place = error.filename or folder
        raise LoadmasterError(f"{place}: cannot be written: {error.strerror or error}") from error
    return written


def _side_by_side(picture: Picture) -> dict[str, object]:
    charts = [chart.properties(width=WIDTH) for chart in picture.charts]
    whole = alt.hconcat(*charts) if len(charts) > 1 else charts[0]
    return whole.properties(background="white").to_dict()
