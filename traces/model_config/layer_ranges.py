"""Layers written as text, "3-60" or "0,2,5-9,11-47/2": read, and written back."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import InputError

_PART = re.compile(r"(\d+)(?:\s*-\s*(\d+)(?:\s*/\s*(\d+))?)?")
MOST_LAYERS = 10_000         # far beyond any model


def parse_layers(text: str) -> tuple[int, ...]:
    """The layers that a list of numbers and ranges means; "1-47/2" is every second from 1.

    Raises InputError where the text is no such list, goes backwards or names a layer twice.
    """
    layers: list[int] = []
    for part in str(text).split(","):
        found = _PART.fullmatch(part.strip())
        if found is None:
            raise InputError(
                f"layers {text!r}: {part.strip()!r} is neither a number nor a range: write 3-60, "
                "0,2,4 or 1-47/2 (every second)"
            )
        first = int(found[1])
        last, step = int(found[2] or first), int(found[3] or 1)
        if last < first or step < 1 or last >= MOST_LAYERS:
            raise InputError(
                f"layers {text!r}: {part.strip()!r} must go upwards, from 0 to {MOST_LAYERS - 1}"
            )
        layers += range(first, last + 1, step)
    if len(set(layers)) != len(layers):
        raise InputError(f"layers {text!r}: a layer is named twice")
    return tuple(sorted(layers))


def written(layers: Sequence[int]) -> str:
    """The shortest such text: runs as ranges, of one step each."""
    parts: list[str] = []
    rest = list(layers)
    while rest:
        step = rest[1] - rest[0] if len(rest) > 1 else 1
        run = 1
        while run < len(rest) and rest[run] - rest[run - 1] == step:
            run += 1
        if run == 2 and step > 1:
            run = 1
        first, last = rest[0], rest[run - 1]
        parts.append(
            str(first) if run == 1 else f"{first}-{last}" + (f"/{step}" if step > 1 else "")
        )
        rest = rest[run:]
    return ",".join(parts)
