"""What all importers share: how many devices, a slot for every expert, whose layers these are."""

from pathlib import Path

import numpy as np
import pytest

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.formats.imported import Known, build_plan, model_layers
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


def known(**given: int) -> Known:
    return Known(Path("plan.json"), **given)


def test_the_number_of_devices_is_the_files_or_else_the_callers() -> None:
    assert known().devices(4) == 4 and known(num_devices=4).devices(4) == 4
    assert known(num_devices=8).devices() == 8
    with pytest.raises(UsageError, match="is for 4 devices, not 8"):
        known(num_devices=8).devices(4)
    with pytest.raises(UsageError, match="give num_devices"):
        known().devices()


def test_every_expert_needs_a_slot_and_every_slot_an_expert_there_is() -> None:
    def build(slots: np.ndarray, experts: int = 4) -> Plan:
        return build_plan(known(), slots, experts, ["layer 3", "layer 4"], (3, 4),
                          engine="SGLang", dispatch="even")

    assert build(SLOTS).same_slots(TOLD)
    lost = SLOTS.copy()
    lost[1, 0, 1] = 0
    with pytest.raises(InputError, match="layer 4: expert 1 has no slot on any device;"):
        build(lost)
    with pytest.raises(InputError, match=r"layer 3, device 1, slot 1 holds expert 3; .* 0 to 2"):
        build(SLOTS, 3)
