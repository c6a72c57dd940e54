"""Counts per expert from the rows of tables, of one rank or summed over several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import InputError
from ...model_spec import MOST_EXPERTS
from ..asked import Asked
from ..cleaning.loads import loads_result
from ..result import LOADS_ONLY, NO_PHASE, ImportResult
from .ranks import rank_notes
from .row_columns import Columns

MOST_WINDOWS = 1_024         # beyond so many, neighbours are summed: memory stays bounded

Rows = Iterable[tuple[str, Mapping[str, Any]]]


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
        notes=(*rank_notes(path, [file for file, _ in files]),
               *_notes(counts, listed, asked, columns)),
        cannot_tell=(*LOADS_ONLY, NO_PHASE), model_name=path.stem,
    )


def _notes(counts: _Counts, listed: bool, asked: Asked, columns: Columns) -> list[str]:
    said = []
    if columns.wide:
        said.append(
            f"columns {columns.wide[0]} to {columns.wide[-1]} taken for the counts of one expert "
            "each: name them topk_0, topk_1, … if they are a token's choices"
        )
    if not listed and asked.experts() is None:
        said.append(
            f"{counts.experts} experts per layer, going by the largest id: --num-experts makes "
            "sure of it"
        )
    if counts.width > 1:
        said.append(f"{counts.width} numbers of {columns.names['window']} together are a window")
    return said
