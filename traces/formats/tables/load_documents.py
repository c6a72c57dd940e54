"""Counts per expert in a JSON document: SGLang's logical_count, histories, tables by layer.

A history is a list of windows, each a matrix or a mapping that holds one. Rows may be keyed by
layer number. Knows documents. Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import InputError
from ...model_spec import MOST_EXPERTS
from ..asked import Asked
from ..cleaning.loads import loads_result
from ..engines.sglang import import_logical_count
from ..result import LOADS_ONLY, NO_PHASE, ImportResult
from .row_columns import NAMES
from .row_loads import MOST_WINDOWS

MATRIX = ("logical_expert_load", "expert_load", "expert_loads", "expert_counts", "expert_count",
          "tokens_per_expert", "loads", "load", "counts", "logical_count")
HISTORY = ("load_history", "history", "windows", "records", "steps", "iterations")
LAYER_NAMES = NAMES["layer"]
_LAYER = re.compile(r"(?:layers?[_. ]?)?(\d{1,5})")
_SLOTS = ("p2l_map", "physical_to_logical_map")
_DEEPEST = 4


def import_load_document(path: Path, value: Any, asked: Asked) -> ImportResult | None:
    """The counts that a document holds; None where it holds none. Raises InputError."""
    if isinstance(value, dict) and "logical_count" in value:
        return import_logical_count(path, value["logical_count"], "SGLang logical_count", asked)
    found = _find(value, 0)
    if found is None:
        return None
    name, counts, numbers = found
    return loads_result(
        counts, asked, str(path), format="loads (.json)", numbers=numbers, model_name=path.stem,
        notes=(f"loads read from {name!r}",) if name else (),
        cannot_tell=(*LOADS_ONLY, NO_PHASE),
    )


def import_load_lines(path: Path, lines: Iterable[tuple[str, Any]], asked: Asked) -> ImportResult:
    """As `import_load_document`, one window a line; beyond MOST_WINDOWS neighbours are summed.

    Raises InputError naming the line that holds no loads, or others than the first.
    """
    windows: list[npt.NDArray[np.float64]] = []
    width, numbers, name = 1, None, ""
    for number, (where, value) in enumerate(lines):
        found = _find(value, 0)
        if found is None:
            raise InputError(f"{where}: holds no loads per expert, as the lines before")
        counts = np.array(found[1], np.float64)
        if number == 0:
            name, _, numbers = found
        elif counts.shape != windows[0].shape or found[2] != numbers:
            raise InputError(
                f"{where}: holds loads {list(counts.shape)}, the lines before "
                f"{list(windows[0].shape)}: give lines of one model"
            )
        if number // width < len(windows):
            windows[number // width] += counts
        else:
            windows.append(counts)
        if len(windows) > MOST_WINDOWS:
            pairs = [sum(windows[i : i + 2]) for i in range(0, len(windows), 2)]
            windows, width = [np.asarray(pair) for pair in pairs], 2 * width
    told = (f"loads read from {name!r}",) if name else ()
    return loads_result(
        np.stack(windows), asked, str(path), format="loads (.jsonl)", numbers=numbers,
        model_name=path.stem, cannot_tell=(*LOADS_ONLY, NO_PHASE),
        notes=(*told, *([f"{width} lines together are a window"] if width > 1 else [])),
    )


def holds_loads(value: Any) -> bool:
    """Whether a line is a window of loads."""
    return _find(value, 0) is not None


Found = tuple[str, Any, tuple[int, ...] | None]     # name, array, layer numbers


def _find(value: Any, depth: int) -> Found | None:
    if depth > _DEEPEST:
        return None
    if isinstance(value, list):
        if _is_numbers(value):
            return "", value, None
        return _windows(value, depth)
    if not isinstance(value, dict):
        return None
    for name in (*MATRIX, *HISTORY, "layers"):
        if name in value and (found := _find(value[name], depth + 1)) is not None:
            _, counts, numbers = found
            return name, _by_expert(value, counts), numbers
    return _by_layer(value)


def _windows(value: list[Any], depth: int) -> Found | None:
    """A list of windows of one shape, each a matrix in some wrapping."""
    if layers := _listed_layers(value):
        return layers
    parts = [_find(part, depth + 1) for part in value]
    there = [part for part in parts if part is not None]
    if not there or len(there) < len(parts):
        return None
    shapes = {np.shape(counts) for _, counts, _ in there}
    if len(shapes) > 1 or len({numbers for _, _, numbers in there}) > 1:
        raise InputError(
            f"its windows hold loads of different shapes, {sorted(map(str, shapes))[:3]}: give "
            "windows of one model"
        )
    name, _, numbers = there[0]
    return name, [counts for _, counts, _ in there], numbers


def _listed_layers(value: list[Any]) -> Found | None:
    """[{"layer": 3, "counts": [...]}, …]: one entry for each layer."""
    if not all(isinstance(entry, dict) for entry in value):
        return None
    named = [next((entry[n] for n in LAYER_NAMES if n in entry), None) for entry in value]
    if not value or not all(type(number) is int and number >= 0 for number in named):
        return None
    rows = [
        next((found for n in MATRIX if (found := _counts_of(entry.get(n))) is not None), None)
        for entry in value
    ]
    return _numbered([number for number in named if number is not None], rows)


def _by_layer(value: dict[str, Any]) -> Found | None:
    """{"3": [counts], …}, or "layer_3": the model's own layer numbers."""
    named = [_LAYER.fullmatch(str(key)) for key in value]
    if not value or None in named:
        return None
    numbers = [int(match[1]) for match in named if match is not None]
    rows = [_counts_of(row) for row in value.values()]
    by_expert = any(isinstance(row, dict) for row in value.values())
    return _numbered(numbers, _padded(rows) if by_expert else rows)


def _padded(rows: list[list[float] | None]) -> list[list[float] | None]:
    """Rows of counts by expert, as long as the longest: the last experts may have had no token."""
    most = max((len(row) for row in rows if row is not None), default=0)
    return [None if row is None else row + [0.0] * (most - len(row)) for row in rows]


def _numbered(numbers: list[int], rows: list[list[float] | None]) -> Found | None:
    """Rows in the order of their layers; None where one holds no counts."""
    there = [row for row in rows if row is not None]
    if len(there) < len(rows) or not rows:
        return None
    if len({len(row) for row in there}) > 1:
        raise InputError("its layers list different numbers of experts")
    if len(set(numbers)) < len(numbers):
        raise InputError("it names a layer twice")
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return "", [there[i] for i in order], tuple(numbers[i] for i in order)


def _counts_of(row: Any) -> list[float] | None:
    """[counts], or {"0": count, "7": count} where experts that are absent had no token."""
    if isinstance(row, list) and _is_numbers(row) and not isinstance(row[0], list):
        return row
    if isinstance(row, dict) and row and all(str(key).isdecimal() for key in row):
        experts = [int(key) for key in row]
        if max(experts) < MOST_EXPERTS and _is_numbers(list(row.values())):
            counts = [0.0] * (max(experts) + 1)
            for expert, count in zip(experts, row.values(), strict=True):
                counts[expert] = count
            return counts
    return None


def _by_expert(value: dict[str, Any], counts: Any) -> Any:
    """Counts of slots summed to experts, where the map of slots lies beside them."""
    name = next((name for name in _SLOTS if name in value), None)
    if name is None:
        return counts
    map_LS, count_LS = np.array(value[name]), np.array(counts, np.float64)
    if map_LS.dtype.kind not in "iu" or map_LS.ndim != 2 or map_LS.shape != count_LS.shape:
        raise InputError(
            f"{name} {list(map_LS.shape)} is not the expert of each slot of the loads "
            f"{list(count_LS.shape)}"
        )
    if not 0 <= map_LS.min() <= map_LS.max() < map_LS.shape[1]:
        raise InputError(f"{name} names experts outside [0, {map_LS.shape[1]})")
    experts = int(map_LS.max()) + 1
    return np.stack([
        np.bincount(slots, row, experts) for slots, row in zip(map_LS, count_LS, strict=True)
    ])


def _is_numbers(value: list[Any]) -> bool:
    """Whether a nested list holds numbers alone, in equal rows."""
    first: Any = value
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, bool) or not isinstance(first, (int, float)):
        return False
    try:
        return np.array(value).dtype.kind in "iuf"
    except ValueError:
        return False
