"""Counts per expert from the rows of tables, of one rank or summed over several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ..model_spec import MOST_EXPERTS
from .asked import Asked
from .loads import loads_result
from .result import LOADS_ONLY, NO_PHASE, ImportResult
from .row_columns import Columns

MOST_WINDOWS = 1_024         # beyond so many, neighbours are summed: memory stays bounded
_RANK = re.compile(r"(?P<before>.*?rank[-_ ]?)(?P<rank>\d+)(?P<after>.*)", re.IGNORECASE)

Rows = Iterable[tuple[str, Mapping[str, Any]]]


def rank_files(path: Path) -> list[Path]:
    """`path` and the files beside it that are named alike but for the number of the rank."""
    match = _RANK.fullmatch(path.name)
    if match is None:
        return [path]
    beside = [
        (int(m["rank"]), other) for other in path.parent.iterdir()
        if (m := _RANK.fullmatch(other.name)) and other.is_file()
        and (m["before"], m["after"]) == (match["before"], match["after"])
    ]
    return [other for _, other in sorted(beside)]


class _Counts:
    """Counts per window, layer and expert, as they are read."""

    def __init__(self) -> None:
        self.windows: dict[int, dict[int, dict[int, float]]] = {}
        self.experts = 0
        self.width = 1          # of a window, in the table's own numbers

    def add(self, window: int, layer: int, counts: Iterable[tuple[int, float]]) -> None:
        held = self.windows.setdefault(window // self.width, {}).setdefault(layer, {})
        for expert, count in counts:
            held[expert] = held.get(expert, 0.0) + count
            self.experts = max(self.experts, expert + 1)
        if len(self.windows) > MOST_WINDOWS:
            self._halve()

    def _halve(self) -> None:
        old, self.windows = self.windows, {}
        self.width *= 2
        for window, layers in old.items():
            for layer, counts in layers.items():
                held = self.windows.setdefault(window // 2, {}).setdefault(layer, {})
                for expert, count in counts.items():
                    held[expert] = held.get(expert, 0.0) + count


def import_row_loads(
    path: Path, files: list[tuple[Path, Rows]], columns: Columns, asked: Asked
) -> ImportResult:
    """Tables with the same columns, summed. Raises InputError naming the row."""
    counts = _Counts()
    listed = "counts" in columns
    for _, rows in files:
        for where, row in rows:
            window = columns.whole(row, "window", where) if "window" in columns else 0
            layer = columns.whole(row, "layer", where) if "layer" in columns else 0
            if listed:
                found = columns.numbers(row, "counts", where)
                if counts.experts not in (0, len(found)):
                    raise InputError(
                        f"{where}: lists {len(found)} experts, those before {counts.experts}"
                    )
                counts.add(window, layer, enumerate(found))
                continue
            expert = columns.whole(row, "expert", where)
            if expert >= MOST_EXPERTS:
                raise InputError(f"{where}: expert {expert} is beyond {MOST_EXPERTS}")
            counts.add(window, layer, [(expert, columns.whole(row, "count", where))])
    if not counts.windows:
        raise InputError(f"{path}: holds no row")
    experts = counts.experts if listed else asked.experts() or counts.experts
    layers = sorted({layer for held in counts.windows.values() for layer in held})
    load_WLE = np.zeros((len(counts.windows), len(layers), max(experts, counts.experts)))
    for w, window in enumerate(sorted(counts.windows)):
        for layer, held in counts.windows[window].items():
            load_WLE[w, layers.index(layer), list(held)] = list(held.values())
    return loads_result(
        load_WLE, asked, str(path), format="counts by row", axes="LE", numbers=tuple(layers),
        notes=(*_rank_notes(path, [file for file, _ in files]),
               *_notes(counts, listed, asked, columns)),
        cannot_tell=(*LOADS_ONLY, NO_PHASE), model_name=path.stem,
    )


def _notes(counts: _Counts, listed: bool, asked: Asked, columns: Columns) -> list[str]:
    said = []
    if not listed and asked.experts() is None:
        said.append(
            f"{counts.experts} experts per layer, going by the largest id: --num-experts makes "
            "sure of it"
        )
    if counts.width > 1:
        said.append(f"{counts.width} numbers of {columns.names['window']} together are a window")
    return said


def _rank_notes(path: Path, files: list[Path]) -> list[str]:
    if len(files) > 1:
        shown = ", ".join(file.name for file in files[:4]) + (", …" if len(files) > 4 else "")
        return [f"counts of {len(files)} ranks summed: {shown}"]
    match = _RANK.fullmatch(path.name)
    if match is None:
        return []
    return [
        f"warning: by its name these are rank {int(match['rank'])}'s counts alone, and no other "
        "rank's file lies beside it: put them there to sum all"
    ]
