"""Which rows of a dump or plan are which layers of the model, by number or by position.

Engines count differently: a row for every hidden layer, dense ones too; a row for every MoE layer;
a row more for a draft layer. Knows layer numbers. Knows nothing of what the rows hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from .model_spec import ModelSpec


@dataclass(frozen=True)
class LayerRows:
    """The rows that are MoE layers, the model's own numbers of them, and what was decided."""

    rows: tuple[int, ...]
    layers: tuple[int, ...]
    notes: tuple[str, ...] = ()


def rows_of_model(model: ModelSpec, found: int, numbers: Sequence[int] | None = None) -> LayerRows:
    """The MoE rows among `found`, and the model's own numbers of them.

    numbers: the rows' own numbers, where the file says them. Draft layers that the file holds are
    layers of their own. Raises InputError where the rows cannot be the model's.
    """
    if numbers is None:
        numbers = _numbers_by_count(model, found)
    own, draft = set(model.own_layer_indices()), set(draft_layers(model))
    rows = tuple(i for i, layer in enumerate(numbers) if layer in own or layer in draft)
    kept = tuple(numbers[i] for i in rows)
    strange = [layer for layer in numbers if layer not in own | draft and not _dense(model, layer)]
    if strange or not rows:
        raise InputError(
            f"holds layers {spans(numbers)}, the MoE layers of {model.name} are "
            f"{spans(sorted(own))}: another model, or number the rows by --layers, as in "
            f"--layers {spans(sorted(own)[:found])}"
        )
    notes = []
    if len(rows) < found:
        dense = sorted(set(numbers) - set(kept))
        notes.append(f"layers {spans(dense)} are dense in {model.name}: left out")
    if set(kept) & draft:
        notes.append(
            f"layer {spans(sorted(set(kept) & draft))} is a draft (MTP) layer of {model.name}: a "
            "layer of its own"
        )
    return LayerRows(rows, kept, tuple(notes))


def draft_layers(model: ModelSpec) -> tuple[int, ...]:
    """The model's own numbers of its draft (MTP) layers, which follow the hidden ones."""
    return ()


def missing_layers(model: ModelSpec, layers: Sequence[int]) -> tuple[int, ...]:
    """The model's MoE layers that are not among `layers`, which are its own numbers."""
    return tuple(sorted(set(model.own_layer_indices()) - set(layers)))


def spans(numbers: Sequence[int]) -> str:
    """Layer numbers for people, and for --layers: 3-60, or 0,2,5-7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def parse_spans(text: str) -> tuple[int, ...]:
    """The numbers of "3-60" or "0,2,5-7". Raises InputError."""
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        low, _, high = part.partition("-")
        if not low.isdecimal() or (high and not high.isdecimal()) or len(part) > 12:
            raise InputError(f"layers {text!r} are written as in 3-60 or 0,2,5-7")
        first, last = int(low), int(high or low)
        if not first <= last < first + 10_000:
            raise InputError(f"layers {text!r}: {part} does not count up")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise InputError(f"layers {text!r} name a layer twice")
    return tuple(found)


def _numbers_by_count(model: ModelSpec, found: int) -> Sequence[int]:
    own, draft = model.own_layer_indices(), draft_layers(model)
    total = hidden_layers(model)
    for numbers in (own, range(total), own + draft, (*range(total), *draft)):
        if found == len(numbers):
            return tuple(numbers)
    raise InputError(
        f"holds {found} rows; {model.name} has {len(own)} MoE layers ({spans(own)}) of {total}: "
        "say which layers the rows are by --layers, as in --layers "
        f"{spans(own[:found]) if found < len(own) else spans(own)}"
    )


def hidden_layers(model: ModelSpec) -> int:
    """All hidden layers, dense ones too, without draft layers."""
    return model.total_layers or max(model.own_layer_indices()) + 1


def _dense(model: ModelSpec, layer: int) -> bool:
    return 0 <= layer < hidden_layers(model)
