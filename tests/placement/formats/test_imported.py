"""Which of the model's layers a plan is for: told by the plan, by the model, or not at all."""

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.placement.formats.imported import model_layers
from loadmaster.placement.plan import Plan
from loadmaster.traces.model_spec import ModelSpec

SLOTS = np.arange(4).reshape(2, 2)[None].repeat(2, 0)
COUNTED = Plan(SLOTS, num_experts=4)
TOLD = Plan(SLOTS, num_experts=4, layer_indices=(3, 4))


def model(*layers: int) -> ModelSpec:
    return ModelSpec(num_layers=2, num_experts=4, top_k=1, layer_indices=layers or None)


def test_without_a_model_the_plan_tells_or_nobody_does() -> None:
    assert model_layers(COUNTED, None) == (None, [])
    assert model_layers(TOLD, None) == ((3, 4), [])


def test_a_plan_that_counts_from_0_takes_the_models_layers_with_a_note() -> None:
    layers, notes = model_layers(COUNTED, model(3, 4))
    assert layers == (3, 4)
    assert notes == ["layers are taken to be the model's MoE layers, 3 to 4"]


def test_plan_and_model_that_agree_need_no_note_and_others_are_refused() -> None:
    assert model_layers(TOLD, model(3, 4)) == ((3, 4), [])
    with pytest.raises(InputError, match="layers 3-4 are not MoE layers of model, 5-6"):
        model_layers(TOLD, model(5, 6))
