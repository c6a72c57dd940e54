"""How the command line speaks: the verdict first, then tables; JSON on stdout, progress on stderr.

Knows strings and numbers. Knows nothing of plans or traces.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..foundation.plain_values import plain
from .spelling import one_line, writable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from .progress import PlainProgress


class ReaderGoneError(Exception):
    """Whoever read stdout has seen enough, as in `loadmaster schema | head -1`."""


def out() -> Console:
    """Results, on stdout. Wide enough for a table when the output is a file.

    Printing raises ReaderGoneError where nobody reads any more.
    """
    from rich.console import Console

    class Results(Console):
        def on_broken_pipe(self) -> None:
            raise ReaderGoneError

    return Results(soft_wrap=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def err() -> Console:
    """Everything that is not a result, on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_error(text: str) -> None:
    """What went wrong, as one line on stderr."""
    print_line(f"loadmaster: {text}")


def print_line(text: str) -> None:
    """A line on stderr; nothing for an empty one. A terminal that is gone stops no work."""
    if text:
        with suppress(OSError):
            print(one_line(text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout; NaN and infinity become null. Raises ReaderGoneError."""
    print_raw(json.dumps(plain(value), indent=2, sort_keys=False) + "\n")


def print_raw(text: str) -> None:
    """Text for another program, on stdout as it is. Raises ReaderGoneError."""
    try:
        print(text, end="", flush=True)     # or a short one would break when Python ends
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def print_verdict(text: str) -> None:
    """The answer in one sentence."""
    out().print(_shown(text, style="bold"))


def _shown(text: str, style: str = "") -> Text:
    """Spelled before a table makes room for it."""
    from rich.text import Text

    return Text(writable(one_line(text), sys.stdout), style=style)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table: first column left, numbers right."""
    from rich import box
    from rich.table import Table

    table = Table(title=_shown(title, "table.title") if title else None, box=box.SIMPLE_HEAD,
                  title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        first = index == 0
        table.add_column(_shown(column), justify="left" if first else "right", no_wrap=first)
    for row in rows:
        table.add_row(*(_shown(figure(cell)) for cell in row))
    out().print(table)


def print_text(text: str) -> None:
    """A line of the answer that is neither its verdict nor a note."""
    out().print(_shown(text))


def print_notes(notes: Iterable[str]) -> None:
    """What a reader must know besides the table, each printed once."""
    for note in dict.fromkeys(notes):
        out().print(_shown(f"note: {note}", style="dim"))


def figure(value: Any, digits: int = 3) -> str:
    """A number for people: thousands grouped, small ones with `digits` decimals, None as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"
    return str(value)


def band(centre: float, low: float, high: float) -> str:
    """A change in per cent with the reach of its band; ± ? where the band has no end."""
    reach = (high - low) / 2
    return f"{centre:+.1f} ± {reach:.1f}" if math.isfinite(reach) else f"{centre:+.1f} ± ?"


def metric(name: str) -> str:
    """The heading of a comparison's metric."""
    return name.replace("_us", ", us").replace("_", " ")


def progress_bar() -> Progress | PlainProgress:
    """A progress bar on stderr; plain lines, now and then, where stderr is no terminal."""
    from .progress import PlainProgress

    if not sys.stderr.isatty():
        return PlainProgress()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=err(), transient=True,
    )
