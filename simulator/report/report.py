"""A report: what is answered, the picture that shows it, the figures, how far to believe them.

Plain data: `page.py` makes the page of it, `pictures.py` image files. Knows nothing of verbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True, eq=False)
class Report:
    """In the order of reading: verdict, the picture that shows it, tables, more pictures, what it
    was judged on, notes. document: the same answer as JSON; it travels inside the page."""

    title: str
    verdict: str
    lead: Picture | None = None
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    judged_on: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)

    @property
    def all_pictures(self) -> tuple[Picture, ...]:
        """The leading one first."""
        return (*([] if self.lead is None else [self.lead]), *self.pictures)
