"""Files as writers of the field leave them: read where the engine reads them, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.formats import export_plan, import_plan
from loadmaster.traces.model_spec import DraftLayers, ModelSpec

from .engine_files import MODEL, SLOTS, TOY, toy_document, write

Edit = Callable[[dict[str, Any]], Any]

DRAFTED = MODEL.model_copy(
    update={"draft_layers": DraftLayers(layer_indices=(3,), num_experts=6, top_k=2)}
)


# ---- vllm-ascend ------------------------------------------------------------------------------


def number(ids: list[int]) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        for layer, told in zip(document["layer_list"], ids, strict=True):
            layer["layer_id"] = told

    return edit


def without(*names: str) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        for layer in document["layer_list"]:
            for holder in (layer, *layer["device_list"]):
                for name in names:
                    holder.pop(name, None)

    return edit


@pytest.mark.parametrize(("edit", "layers", "said"), [
    (number([0, 1]), (), ""),
    (number([1, 2]), (), "layer_id counts from 1; the engine reads by position"),
    (number([3, 7]), (3, 7), "layer_id is taken for the model's own numbers, 3,7"),
    (without("layer_id", "device_id", "device_count"), (), ""),
    (lambda document: document.update(strategy_version=9), (), "left unread, as by the engine"),
])
def test_ascend_ids_are_what_they_count_and_defaults_may_be_absent(
    edit: Edit, layers: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    document = toy_document("vllm_ascend", tmp_path)
    edit(document)
    found = import_plan(write("vllm_ascend", document, tmp_path), "vllm_ascend")
    assert found.plan.slots.tolist() == SLOTS.tolist()
    assert found.plan.layer_indices == layers and said in " ".join(found.notes)


def test_ascend_ids_that_are_the_models_own_numbers_are_so_with_the_model(tmp_path: Path) -> None:
    """1 and 2 may count from 1, or name the layers behind a dense one."""
    document = toy_document("vllm_ascend", tmp_path)
    number([1, 2])(document)
    found = import_plan(write("vllm_ascend", document, tmp_path), "vllm_ascend", model=MODEL)
    assert found.plan.layer_indices == (1, 2)
    assert "layer_id says the model's own numbers, 1-2" in found.notes
    number([7, 9])(document)
    found = import_plan(write("vllm_ascend", document, tmp_path), "vllm_ascend", model=MODEL)
    assert found.plan.layer_indices == (1, 2)
    assert "layer_id says 7,9, and the model's MoE layers are 1-2: taken by position" in (
        " ".join(found.notes)
    )


def test_ascend_devices_of_shared_experts_are_left_out_and_said(tmp_path: Path) -> None:
    """Expert tools write [0] for each of them, before the devices that hold routed experts."""
    document = toy_document("vllm_ascend", tmp_path)
    for layer in document["layer_list"]:
        held = [[0], [0], *(device["device_expert"] for device in layer["device_list"])]
        layer["device_list"] = [
            {"device_id": i, "device_expert": experts} for i, experts in enumerate(held)
        ]
        layer["device_count"] = 4
    path = write("vllm_ascend", document, tmp_path)
    for devices in (None, 2, 4):
        found = import_plan(path, "vllm_ascend", num_devices=devices)
        assert found.plan.slots.tolist() == SLOTS.tolist()
        assert "device 0 to 1 holds expert 0 alone in every layer" in " ".join(found.notes)
    with pytest.raises(UsageError, match="is for 2 devices, not 3"):
        import_plan(path, "vllm_ascend", num_devices=3)


def test_ascend_devices_that_really_hold_expert_0_alone_are_kept(tmp_path: Path) -> None:
    document = {"moe_layer_count": 1, "layer_list": [{"device_list": [
        {"device_expert": [0]}, {"device_expert": [1]}
    ]}]}
    found = import_plan(write("vllm_ascend", document, tmp_path), "vllm_ascend")
    assert found.plan.slots.tolist() == [[[0], [1]]]


# ---- TensorRT-LLM -----------------------------------------------------------------------------


def test_trtllm_keys_that_the_engine_defaults_may_be_absent(tmp_path: Path) -> None:
    document = toy_document("trtllm", tmp_path)
    del document["layer_updates_per_iter"]
    document |= {"mode": "standard", "auxiliary_sms": 4}
    path = tmp_path / "lb.yaml"
    path.write_text(yaml.safe_dump(document))
    found = import_plan(path, "trtllm", num_devices=2)
    assert found.plan.slots.tolist() == SLOTS.tolist() and found.plan.layer_indices == (1, 2)


def test_trtllm_draft_layers_are_layers_of_their_own(tmp_path: Path) -> None:
    """There and back; a layer that is neither is refused as before."""
    document = toy_document("trtllm", tmp_path)
    document["initial_global_assignments"][3] = document["initial_global_assignments"][1]
    path = tmp_path / "draft.yaml"
    path.write_text(yaml.safe_dump(document))
    found = import_plan(path, "trtllm", num_devices=2, model=DRAFTED)
    assert found.plan.layer_indices == (1, 2, 3)
    assert "layer 3 is a draft (MTP) layer of toy" in " ".join(found.notes)
    export_plan(found.plan, "trtllm", tmp_path / "back.yaml", model=DRAFTED)
    again = import_plan(tmp_path / "back.yaml", "trtllm", num_devices=2, model=DRAFTED)
    assert again.plan.slots.tolist() == found.plan.slots.tolist()
    with pytest.raises(InputError, match="layer 3 is no MoE layer of the model"):
        import_plan(path, "trtllm", num_devices=2, model=MODEL)


# ---- SGLang and vLLM --------------------------------------------------------------------------


def test_sglang_rows_of_moe_layers_alone_are_read_by_position_and_said(tmp_path: Path) -> None:
    rows = SLOTS.reshape(2, -1).tolist()
    path = write("sglang", {"physical_to_logical_map": rows}, tmp_path)
    found = import_plan(path, "sglang", num_devices=2, model=MODEL)
    assert found.plan.slots.tolist() == SLOTS.tolist() and found.plan.layer_indices == (1, 2)
    assert "SGLang itself wants a row for each of the 3 hidden layers" in " ".join(found.notes)


def test_sglang_gets_a_row_more_for_a_draft_layer_that_the_plan_holds(tmp_path: Path) -> None:
    path = write("vllm", [SLOTS.reshape(2, -1)[0].tolist()] * 3, tmp_path)
    drafted = import_plan(path, "vllm", num_devices=2, model=DRAFTED).plan
    assert drafted.layer_indices == (1, 2, 3)
    export_plan(drafted, "sglang", tmp_path / "s.json", model=DRAFTED)
    assert len(json.loads((tmp_path / "s.json").read_text())["physical_to_logical_map"]) == 4
    export_plan(TOY, "sglang", tmp_path / "t.json", model=DRAFTED)
    assert len(json.loads((tmp_path / "t.json").read_text())["physical_to_logical_map"]) == 3


def test_a_bare_list_is_vllms(tmp_path: Path) -> None:
    rows = SLOTS.reshape(2, -1).tolist()
    path = write("vllm", rows, tmp_path)
    assert import_plan(path, "vllm", num_devices=2).plan.slots.tolist() == SLOTS.tolist()
    with pytest.raises(InputError, match="--format vllm reads it"):
        import_plan(path, "sglang", num_devices=2)
    one = write("vllm", rows[0], tmp_path)
    with pytest.raises(UsageError, match=r"one list for all layers.*--model"):
        import_plan(one, "vllm", num_devices=2)
    found = import_plan(one, "vllm", num_devices=2, model=MODEL)
    assert found.plan.slots.tolist() == [SLOTS[0].tolist()] * 2


def test_loads_are_sent_to_plan_with_the_command(tmp_path: Path) -> None:
    path = write("sglang", {"logical_count": [[1, 2]]}, tmp_path)
    with pytest.raises(InputError, match=r"`loadmaster plan .*file\.json --out plan\.json`"):
        import_plan(path, "sglang", num_devices=2)


def test_a_model_with_sizes_alone_still_numbers_nothing(tmp_path: Path) -> None:
    """A ModelSpec by hand without layer numbers fits plans of as many layers."""
    bare = ModelSpec(num_layers=2, num_experts=6, top_k=2)
    export_plan(TOY, "trtllm", tmp_path / "t.yaml", model=bare)
    assert set(toy_document("trtllm", tmp_path)["initial_global_assignments"]) == {1, 2}


def test_a_mapping_record_is_vllms_too(tmp_path: Path) -> None:
    rows = SLOTS.reshape(2, -1).tolist()
    record = {"record_type": "eplb_initial_mapping", "num_slots": 8,
              "initial_global_assignments": {"0": rows[0], "1": rows[1]}}
    path = write("vllm", record, tmp_path)
    assert import_plan(path, "vllm", num_devices=2).plan.slots.tolist() == SLOTS.tolist()
    record["initial_global_assignments"] = {"1": rows[0], "2": rows[1]}
    with pytest.raises(InputError, match="lacks MoE layer 0"):
        import_plan(write("vllm", record, tmp_path), "vllm", num_devices=2)
