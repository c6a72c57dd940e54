"""Which rows of a dump or plan are which layers of the model, by number or by position.

Engines count differently: a row for every hidden layer, dense ones too; a row for every MoE layer;
a row more for a draft layer. Knows layer numbers. Knows nothing of what the rows hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from .model_config.layer_ranges import written
from .model_spec import ModelSpec


@dataclass(frozen=True)
class LayerRows:
    """The rows that are MoE layers, the model's own numbers of them, and what was decided."""

    rows: tuple[int, ...]
    layers: tuple[int, ...]
    notes: tuple[str, ...] = ()


def rows_of_model(
    model: ModelSpec, found: int, numbers: Sequence[int] | None = None, remedy: str = ""
) -> LayerRows:
    """The MoE rows among `found`, and the model's own numbers of them.

    numbers: the rows' own numbers, where the file says them. Draft layers that the file holds are
    layers of their own. remedy: what to do where the rows cannot be the model's, which raises
    InputError.
    """
    if numbers is None:
        numbers = _numbers_by_count(model, found, remedy)
    if model.layer_indices is None and found == model.num_layers:
        return LayerRows(tuple(range(found)), tuple(numbers))
    own, draft = set(model.own_layer_indices()), set(draft_layers(model))
    rows = tuple(i for i, layer in enumerate(numbers) if layer in own or layer in draft)
    kept = tuple(numbers[i] for i in rows)
    strange = [layer for layer in numbers if layer not in own | draft and not _dense(model, layer)]
    if strange or not rows:
        raise InputError(
            f"holds layers {written(numbers)}, the MoE layers of {model.name} are "
            f"{written(sorted(own))}: it belongs to another model{remedy}"
        )
    notes = []
    if len(rows) < found:
        dense = sorted(set(numbers) - set(kept))
        notes.append(f"layers {written(dense)} are dense in {model.name}: left out")
    if set(kept) & draft:
        notes.append(
            f"layer {written(sorted(set(kept) & draft))} is a draft (MTP) layer of {model.name}: a "
            "layer of its own"
        )
    return LayerRows(rows, kept, tuple(notes))


def draft_layers(model: ModelSpec) -> tuple[int, ...]:
    """The model's own numbers of draft (MTP) layers whose experts are as many as the others'."""
    draft = model.draft_layers
    same = draft is not None and draft.num_experts == model.num_experts
    return draft.layer_indices if draft is not None and same else ()


def layers_in_model(model: ModelSpec, layers: Sequence[int]) -> tuple[int, ...]:
    """The model's own numbers of rows that are all MoE layers, counted from 0 or by the model.

    Raises InputError where they cannot be the model's.
    """
    own, draft = model.own_layer_indices(), draft_layers(model)
    if tuple(layers) == tuple(range(len(layers))):
        for numbers in (own, own + draft):
            if len(layers) == len(numbers):
                return numbers
    unnumbered = model.layer_indices is None and len(layers) == model.num_layers
    if layers and (unnumbered or set(layers) <= set(own + draft)):
        return tuple(layers)
    raise InputError(
        f"layers {written(layers)} are not MoE layers of {model.name}, {written(own)}: it belongs "
        "to another model, or its layers are misnumbered (`loadmaster trace import --layers`)"
    )


def missing_layers(model: ModelSpec, layers: Sequence[int]) -> tuple[int, ...]:
    """The model's MoE layers that are not among `layers`. Raises InputError: `layers_in_model`."""
    held = layers_in_model(model, layers)
    if model.layer_indices is None and len(held) == model.num_layers:
        return ()
    return tuple(sorted(set(model.own_layer_indices()) - set(held)))


def _numbers_by_count(model: ModelSpec, found: int, remedy: str) -> Sequence[int]:
    own, draft = model.own_layer_indices(), draft_layers(model)
    total = hidden_layers(model)
    for numbers in (own, range(total), own + draft, (*range(total), *draft)):
        if found == len(numbers):
            return tuple(numbers)
    raise InputError(
        f"holds {found} rows; {model.name} has {len(own)} MoE layers ({written(own)}) of {total} "
        f"hidden ones: it belongs to another model{remedy}"
    )


def hidden_layers(model: ModelSpec) -> int:
    """All hidden layers, dense ones too, without draft layers."""
    return model.total_layers or max(model.own_layer_indices()) + 1


def _dense(model: ModelSpec, layer: int) -> bool:
    return 0 <= layer < hidden_layers(model)
