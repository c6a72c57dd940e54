"""A report: what is answered, the picture that shows it, the figures, how far to believe them.

The text is what a terminal prints as well; pictures are drawn only when asked for. `page.py` makes
a page of it, `pictures.py` image files. Knows nothing of verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .charts.theme import Drawing


@dataclass(frozen=True)
class Table:
    """A titled table of texts; the first column is left-aligned. folded: closed at first."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """One or several charts side by side. name: of its image file."""

    name: str
    title: str
    charts: tuple[Drawing, ...]
    caption: str = ""


def _nothing() -> tuple[Picture, ...]:
    return ()


@dataclass(frozen=True, eq=False)
class Report:
    """In the order of reading: verdict, the first picture, tables, more pictures, what it was
    judged on, notes. document: the same answer as JSON. draw: makes the pictures."""

    title: str
    verdict: str
    tables: tuple[Table, ...] = ()
    judged_on: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    draw: Callable[[], tuple[Picture, ...]] = _nothing
