"""Finished cells of a what-if study, kept in a file as they come, so that a study resumes.

One JSON line per cell, with the fingerprint of its study; one file may hold several studies'. Knows
lines and files. Knows nothing of how a cell is run.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError, LoadmasterError, UsageError
from ...foundation.documents import parse_json
from .grid import cell_text


@dataclass(frozen=True)
class Cell:
    """One scenario's outcome; `error` instead of figures where it failed."""

    fields: dict[str, Any]
    figures: dict[str, float | None]
    error: str | None = None
    notes: tuple[str, ...] = ()      # notes on the figures, extrapolation first of all


def finished_cells(path: Path, study: str) -> dict[str, Cell]:
    """The study's cells in the file, by `cell_text`; none where there is no file yet.

    A last line cut short by a crash is passed over. Raises InputError when the file is not one of
    finished cells, UsageError when no cell could be added to it: before the first cell runs.
    """
    _require_writable(path)
    if not path.exists():
        return {}
    cells = {}
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = parse_json(line, str(path), finite=False)     # a figure may be NaN
            if row["study"] == study:
                cells[cell_text(row["fields"])] = Cell(
                    row["fields"], row["figures"], notes=tuple(row.get("notes", ()))
                )
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines) or not _begins_a_cell(line):
                raise InputError(
                    f"{path}: line {number} is not a finished cell: name another file, or remove "
                    "this one to start over"
                ) from error
    return cells


def append_cell(path: Path, study: str, cell: Cell) -> None:
    """Add a finished cell; drops a last line that a crash cut short. Raises LoadmasterError."""
    row = {"study": study, "fields": cell.fields, "figures": cell.figures,
           "notes": list(cell.notes)}
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text if text.endswith("\n") or not text else text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        with path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, separators=(",", ":")) + "\n")
    except OSError as error:
        raise LoadmasterError(
            f"{path}: a finished cell could not be kept: {error.strerror or error}; make room "
            "there and run again: it goes on from the cells before"
        ) from error


def _begins_a_cell(line: str) -> bool:
    """Whether a line may be one of ours, cut short; anything else is not ours to write over."""
    begin = '{"study":'
    return begin.startswith(line.replace(" ", "")[: len(begin)])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no file of finished cells: name another") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _require_writable(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path}: is a folder: name a file for the finished cells")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: make it first")
    target: Any = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise UsageError(f"{path}: cannot be written to: name another file for the finished cells")
