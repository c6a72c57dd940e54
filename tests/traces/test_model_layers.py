"""Rows of a dump or plan as the model's layers: by number, by how many there are, or refused."""

from __future__ import annotations

import pytest

from loadmaster.errors import InputError
from loadmaster.traces.model_layers import (
    draft_layers,
    hidden_layers,
    layers_in_model,
    missing_layers,
    rows_of_model,
)
from loadmaster.traces.model_spec import DraftLayers, ModelSpec

DRAFT = DraftLayers(layer_indices=(61,), num_experts=8, top_k=2)
DEEP = ModelSpec(
    name="deep", num_layers=58, num_experts=8, top_k=2, layer_indices=tuple(range(3, 61)),
    total_layers=61, draft_layers=DRAFT,
)
UNNUMBERED = ModelSpec(num_layers=3, num_experts=8, top_k=2)


@pytest.mark.parametrize(("found", "numbers", "rows", "layers"), [
    (58, None, range(58), range(3, 61)),                 # MoE layers alone
    (61, None, range(3, 61), range(3, 61)),              # hidden layers
    (59, None, range(59), range(3, 62)),                 # MoE layers and the draft layer
    (62, None, range(3, 62), range(3, 62)),              # hidden layers and the draft layer
    (3, (2, 7, 60), (1, 2), (7, 60)),                    # by number, one of them dense
    (2, (5, 61), (0, 1), (5, 61)),
])
def test_rows_are_layers_by_number_or_by_how_many_there_are(
    found: int, numbers: tuple[int, ...] | None, rows: range, layers: range
) -> None:
    told = rows_of_model(DEEP, found, numbers)
    assert (told.rows, told.layers) == (tuple(rows), tuple(layers))
    assert any("draft" in note for note in told.notes) == (61 in layers)


@pytest.mark.parametrize(("found", "numbers", "said"), [
    (24, None, "holds 24 rows; deep has 58 MoE layers .3-60. of 61 hidden ones"),
    (2, (5, 62), "holds layers 5,62, the MoE layers of deep are 3-60"),
    (2, (0, 1), "holds layers 0-1, the MoE layers of deep are 3-60"),
])
def test_rows_that_cannot_be_the_models_are_refused(
    found: int, numbers: tuple[int, ...] | None, said: str
) -> None:
    with pytest.raises(InputError, match=f"{said}.*: do this"):
        rows_of_model(DEEP, found, numbers, ": do this")


def test_layers_counted_from_0_are_the_models_by_position_where_as_many() -> None:
    assert layers_in_model(DEEP, range(58)) == tuple(range(3, 61))
    assert layers_in_model(DEEP, range(59)) == tuple(range(3, 62))
    assert layers_in_model(DEEP, (3, 4, 9)) == (3, 4, 9)
    assert layers_in_model(UNNUMBERED, (4, 5, 6)) == (4, 5, 6)
    for layers in (range(5), (60, 62)):
        with pytest.raises(InputError, match="not MoE layers of deep, 3-60"):
            layers_in_model(DEEP, layers)


def test_missing_layers_are_the_models_own_without_drafts() -> None:
    assert missing_layers(DEEP, range(58)) == ()
    assert missing_layers(DEEP, (*range(5, 61), 61)) == (3, 4)
    assert hidden_layers(DEEP) == 61 and hidden_layers(UNNUMBERED) == 3


def test_a_draft_layer_of_other_experts_is_none_of_ours() -> None:
    assert draft_layers(DEEP) == (61,)
    other = DRAFT.model_copy(update={"num_experts": 4})
    assert draft_layers(DEEP.model_copy(update={"draft_layers": other})) == ()
