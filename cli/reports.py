"""`--report` and `--report-png`: an answer as a page, and its pictures as files.

Knows options and reports. Draws nothing unless it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app.inputs import require_target, writing
from ..errors import UsageError
from . import output as show

if TYPE_CHECKING:
    from ..simulator.report.report import Report

ReportFile = Annotated[
    Path | None,
    typer.Option("--report", help="Report to write: one HTML file that opens anywhere."),
]
ReportPictures = Annotated[
    Path | None, typer.Option("--report-png", help="Folder for the report's pictures, as PNG.")
]


def require_report_targets(
    page: Path | None, pictures: Path | None, parts: Iterable[str] = ("",)
) -> None:
    """Refuse, before any work, what cannot be written or would be written over."""
    for part in parts:
        require_target(_page_of(page, part))
    if pictures is not None and pictures.exists():
        if not pictures.is_dir():
            raise UsageError(f"{pictures} exists and is no folder: name another one")
        if any(pictures.iterdir()):
            raise UsageError(f"{pictures} holds files already: name a new folder for the pictures")


def write_reports(
    reports: Mapping[str, Report], page: Path | None, pictures: Path | None
) -> None:
    """The pages and the pictures that were asked for, of each part ("" = of all)."""
    from ..simulator.report.page import write_page
    from ..simulator.report.pictures import write_pictures

    for part, report in reports.items():
        path = _page_of(page, part)
        if path is not None:
            with writing(path):
                write_page(path, report)
            show.err().print(f"wrote the report to {path}", markup=False)
        if pictures is not None:
            folder = pictures / part
            names = ", ".join(p.name for p in write_pictures(folder, report))
            show.err().print(f"wrote {names} to {folder}", markup=False)


def _page_of(page: Path | None, part: str) -> Path | None:
    """`r.html`, or `r.prefill.html` for a part."""
    if page is None or not part:
        return page
    return page.with_suffix(f".{part}{page.suffix or '.html'}")
