"""Tables of routes or counts, row by row: which column is what, under the names people give them.

A row is a line of a CSV file or of JSONL. Knows names and values of one row. Knows nothing of how
rows become tokens or loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import InputError

# What a column may be called, in lower case; the first that is there counts.
NAMES: dict[str, tuple[str, ...]] = {
    "layer": ("layer", "layer_id", "layer_idx", "layer_index", "moe_layer"),
    "request": ("request", "request_id", "req_id", "seq", "seq_id", "sequence", "sequence_id",
                "prompt_id", "sample_id", "conversation_id"),
    "token": ("token", "token_idx", "token_index", "token_pos", "position", "pos"),
    "expert": ("expert", "expert_id", "expert_idx", "expert_index"),
    "experts": ("experts", "expert_ids", "topk_ids", "topk_experts", "selected_experts",
                "routed_experts", "topk"),
    "count": ("count", "token_count", "num_tokens", "tokens", "load", "hits"),
    "counts": ("tokens_per_expert", "expert_load", "expert_loads", "expert_counts", "expert_count",
               "counts", "loads", "load", "logical_count", "logical_expert_load"),
    "window": ("iteration", "iter", "step", "window", "pass", "forward_pass_id"),
}
# One column per choice (or, where no column tells tokens apart, one per expert): topk_0, topk_1, …
_WIDE = re.compile(r"(?P<what>expert|experts|expert_id|e|topk|top|choice|k)[_ ]?(?P<number>\d+)")
_CHOICES = ("topk", "top", "choice", "k")
_WHOLE_MOST = 2**53


@dataclass(frozen=True)
class Columns:
    """The table's own name of each column that it has."""

    names: Mapping[str, str]
    wide: tuple[str, ...] = ()       # the columns that together are `experts` or `counts`

    def __contains__(self, what: str) -> bool:
        return what in self.names

    def whole(self, row: Mapping[str, Any], what: str, where: str) -> int:
        """A whole number from 0. Raises InputError."""
        return as_count(row.get(self.names[what]), f"{where}: {self.names[what]}")

    def text(self, row: Mapping[str, Any], what: str) -> str:
        """What tells tokens or requests apart; "" where there is no such column."""
        return str(row.get(self.names[what])) if what in self.names else ""

    def numbers(self, row: Mapping[str, Any], what: str, where: str) -> list[int]:
        """A list: JSON's own, or text as in "[3, 1]", "3 1" or "3;1". Raises InputError."""
        name = self.names[what]
        value = [row.get(part) for part in self.wide] if name in self.wide else row.get(name)
        if isinstance(value, str):
            value = value.strip().strip("[]()").replace(";", " ").replace(",", " ").split()
        if not isinstance(value, list) or not value:
            raise InputError(f"{where}: {name} must list numbers, is {str(value)[:40]!r}")
        return [as_count(number, f"{where}: {name}", low=-1) for number in value]


def columns_of(fields: Mapping[str, Any] | list[str]) -> Columns:
    """Which field is what: by name, and where a name may mean two things, by what it holds."""
    lower = {str(name).strip().lower(): str(name) for name in fields}
    found = {
        what: next(lower[name] for name in names if name in lower)
        for what, names in NAMES.items() if any(name in lower for name in names)
    }
    wide = _wide(lower)
    if wide and not {"expert", "experts", "count", "counts"} & set(found):
        prefix = _WIDE.fullmatch(wide[0].strip().lower())
        chosen = "token" in found or (prefix is not None and prefix["what"] in _CHOICES)
        return Columns(found | {"experts" if chosen else "counts": wide[0]}, wide)
    if isinstance(fields, Mapping):
        for one, many in (("expert", "experts"), ("count", "counts")):
            for name, other, lists in ((one, many, True), (many, one, False)):
                if name in found and _lists(fields[found[name]]) == lists:
                    found.setdefault(other, found.pop(name))
    return Columns(found)


def _wide(lower: Mapping[str, str]) -> tuple[str, ...]:
    """Columns of one name with the numbers 0, 1, … or 1, 2, …, in that order; at least two."""
    groups: dict[str, dict[int, str]] = {}
    for name, own in lower.items():
        if match := _WIDE.fullmatch(name):
            groups.setdefault(match["what"], {})[int(match["number"])] = own
    for numbered in groups.values():
        first = min(numbered)
        if first <= 1 and len(numbered) > 1 and sorted(numbered) == list(
            range(first, first + len(numbered))
        ):
            return tuple(numbered[number] for number in sorted(numbered))
    return ()


def _lists(value: Any) -> bool:
    """Whether a value lists numbers, as JSON does or as text."""
    return isinstance(value, list) or (
        isinstance(value, str) and any(mark in value.strip() for mark in "[;, ")
    )


def as_count(value: Any, where: str, low: int = 0) -> int:
    """A whole number from `low`, from text or JSON. Raises InputError."""
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
        if number != int(number) or not low <= number < _WHOLE_MOST:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{where} is {str(value)[:40]!r}, must be a whole number from {low}"
        ) from None
    return int(number)
