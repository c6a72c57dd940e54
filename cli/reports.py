"""`--report` and `--report-png`: an answer as a page, and its pictures as files.

Knows options and reports. Draws nothing unless it is asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def require_report_targets(page: Path | None, pictures: Path | None) -> None:
    """Refuse, before any work, what cannot be written or would be written over."""
    require_target(page)
    if pictures is not None and pictures.exists():
        if not pictures.is_dir():
            raise UsageError(f"{pictures} exists and is no folder: name another one")
        if any(pictures.iterdir()):
            raise UsageError(f"{pictures} holds files already: name a new folder for the pictures")


def write_reports(reports: Sequence[Report], page: Path | None, pictures: Path | None) -> None:
    """The page and the pictures that were asked for; several reports make one page after another,
    named by their titles."""
    from ..simulator.report.page import write_page
    from ..simulator.report.pictures import write_pictures

    for report in reports:
        own = f".{report.title.split()[-1].lower()}" if len(reports) > 1 else ""
        if page is not None:
            path = page.with_suffix(f"{own}{page.suffix or '.html'}") if own else page
            with writing(path):
                write_page(path, report)
            show.err().print(f"wrote the report to {path}", markup=False)
        if pictures is not None:
            folder = pictures / own.removeprefix(".") if own else pictures
            names = ", ".join(p.name for p in write_pictures(folder, report))
            show.err().print(f"wrote {names} to {folder}", markup=False)
