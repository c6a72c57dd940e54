"""Files read row by row, CSV and JSON lines: one row in memory at a time, each with its place.

Knows lines. Knows nothing of what the columns mean.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError
from ..foundation.documents import parse_json

LONGEST_HEADER = 65_536


def rows_of(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row of a .csv or .jsonl as a mapping. Raises InputError naming row and fault."""
    for where, row in json_lines(path) if path.suffix == ".jsonl" else csv_rows(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be a mapping, is a {type(row).__name__}")
        yield where, row


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's value; blank lines are none. Raises InputError."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, row {number}"
                    yield where, parse_json(line, where, finite=False)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row by the names of the first line. Raises InputError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=_delimiter(file))
            for number, row in enumerate(reader, start=1):
                if None in row:
                    raise InputError(
                        f"{path}, row {number}: has more fields than the header names"
                    )
                yield f"{path}, row {number}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def header_of(path: Path) -> list[str]:
    """The names in the first line of a CSV file; [] where it is empty. Raises InputError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, delimiter=_delimiter(file)).fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _delimiter(file: TextIO) -> str:
    """What stands most often in the first line: a comma, a semicolon or a tab."""
    first = file.readline(LONGEST_HEADER)
    file.seek(0)
    return max(",;\t", key=first.count)
