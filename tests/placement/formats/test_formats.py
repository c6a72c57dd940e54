"""Engines' plan files: what goes out comes back, what an engine cannot hold is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.formats import FORMATS, export_plan, import_plan, nearest_plan
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.model_spec import ModelSpec

from .engine_files import (
    FILES,
    MODEL,
    PLANS,
    SLOTS,
    TOY,
    TWICE,
    UNEVEN,
    held,
    needs_plans,
    toy_document,
)

# ---- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "suffix"), FILES)
def test_a_plan_comes_back_as_it_went_out(format: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan{suffix}"
    export_plan(TOY, format, path, model=MODEL)
    back = import_plan(path, format, num_devices=2, model=MODEL).plan
    assert back.layer_indices == (1, 2) and back.num_experts == 6
    assert held(back) == held(TOY)
    assert back.same_slots(TOY) or format == "omni"       # omni knows no order of slots
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@st.composite
def even_plans(draw: st.DrawFn) -> Plan:
    """Every expert somewhere, none twice on a device, all slots filled."""
    devices, width, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(
        st.integers(1, 3))
    experts = draw(st.integers(width, devices * width))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = np.full((layers, devices, width), -1)
    for layer in slots:
        for place, expert in enumerate(rng.permutation(experts)):
            layer[place % devices, place // devices] = expert
        for device, slot in np.argwhere(layer < 0):
            layer[device, slot] = rng.choice(np.setdiff1d(np.arange(experts), layer[device]))
    return Plan(slots=slots.astype(np.int16), num_experts=experts)


@given(plan=even_plans(), dense=st.integers(0, 2))
@settings(max_examples=15, deadline=None)      # each writes and syncs 14 files
def test_any_even_plan_survives_every_format(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan, dense: int
) -> None:
    folder = tmp_path_factory.mktemp("plans")
    model = ModelSpec(
        num_layers=plan.num_layers, num_experts=plan.num_experts, top_k=1,
        layer_indices=tuple(range(dense, dense + plan.num_layers)),
        total_layers=dense + plan.num_layers,
    )
    for format, suffix in FILES:
        path = folder / f"{format}{suffix}"
        export_plan(plan, format, path, model=model)
        back = import_plan(path, format, num_devices=plan.num_devices, model=model).plan
        assert held(back) == held(plan)
        assert back.same_slots(plan) or format == "omni"
        again = folder / f"{format}-again{suffix}"
        export_plan(back, format, again, model=model)
        assert suffix == ".pt" or again.read_bytes() == path.read_bytes()


def test_an_imported_plan_is_dispatched_as_its_engine_does(tmp_path: Path) -> None:
    policies = {}
    for format, suffix in FILES:
        export_plan(TOY, format, tmp_path / f"plan{suffix}", model=MODEL)
        back = import_plan(tmp_path / f"plan{suffix}", format, num_devices=2, model=MODEL).plan
        policies[format] = back.dispatch.policy
    assert policies == {
        "sglang": "sglang_static", "trtllm": "trtllm_round_robin", "vllm": "vllm_hash",
        "vllm_ascend": "ascend_fixed", "eplb": "even", "omni": "even",
    }


def test_files_hold_what_the_engines_document(tmp_path: Path) -> None:
    sglang = toy_document("sglang", tmp_path)
    assert sglang == {"physical_to_logical_map": [
        [0, 1, 2, 3, 4, 5, 0, 1], *SLOTS.reshape(2, 8).tolist()      # layer 0: SGLang's default
    ]}
    assert toy_document("trtllm", tmp_path) == {
        "initial_global_assignments": {1: SLOTS[0].reshape(-1).tolist(),
                                       2: SLOTS[1].reshape(-1).tolist()},
        "layer_updates_per_iter": 0, "num_slots": 8,
    }
    ascend = toy_document("vllm_ascend", tmp_path)
    assert ascend["moe_layer_count"] == 2
    assert [layer["layer_id"] for layer in ascend["layer_list"]] == [0, 1]
    assert ascend["layer_list"][1]["device_list"][1] == {
        "device_id": 1, "device_expert": [4, 5, 0, 3]
    }
    export_plan(TOY, "omni", tmp_path / "omni.npy")
    omni = np.load(tmp_path / "omni.npy")
    assert omni.shape == (2, 2, 6) and omni.dtype == np.int32
    assert omni[1, 0].tolist() == [0, 1, 1, 0, 1, 1]


def test_eplb_tensors_of_its_own_readme_are_read(tmp_path: Path) -> None:
    """phy2log, logcnt and log2phy in the order of creation, as rebalance_experts returns them."""
    phy2log = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]]
    log2phy = [[[12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2], [1, -1], [3, -1], [4, -1],
                [9, -1], [8, 10], [14, -1]]]
    logcnt = [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]]
    torch.save(tuple(torch.tensor(t) for t in (phy2log, log2phy, logcnt)), tmp_path / "plan.pt")
    plan = import_plan(tmp_path / "plan.pt", "eplb", num_devices=8).plan
    assert plan.slots.reshape(-1).tolist() == phy2log[0] and plan.num_experts == 12
    np.savez(tmp_path / "plan.npz", phy2log=phy2log)
    assert import_plan(tmp_path / "plan.npz", "eplb", num_devices=8).plan.same_slots(plan)


# ---- the files that came with the project's data ----------------------------------------------


@needs_plans
@pytest.mark.parametrize(("file", "format"), [
    ("toy_sglang.json", "sglang"), ("toy_trtllm.yaml", "trtllm"),
    ("toy_vllm_ascend.json", "vllm_ascend"),
])
def test_toy_files_mean_what_they_should(file: str, format: str, tmp_path: Path) -> None:
    meaning = json.loads((PLANS / "toy_meaning.json").read_text())
    plan = import_plan(PLANS / file, format, num_devices=meaning["ranks"], model=MODEL).plan
    assert list(map(str, plan.layer_indices)) == list(meaning["expert_of_slot"])
    for layer, name in enumerate(meaning["expert_of_slot"]):
        assert plan.slots[layer].reshape(-1).tolist() == meaning["expert_of_slot"][name]
        assert plan.replicas_LE[layer].tolist() == meaning["replicas"][name]
    export_plan(plan, format, tmp_path / file, model=MODEL)
    load = yaml.safe_load
    assert load((tmp_path / file).read_text()) == load((PLANS / file).read_text())


@needs_plans
@pytest.mark.parametrize(("file", "format", "message"), [
    ("bad_sglang_extra_key.json", "sglang", "key 'made_by' must go"),
    ("bad_sglang_missing_expert.json", "sglang", "layer 1: expert 5 has no slot"),
    ("bad_sglang_short_row.json", "sglang", "layer 1 has 6 slots, the other layers have 8"),
    ("bad_trtllm_short_list.yaml", "trtllm", "layer 2 lists 7 slots, num_slots says 8"),
    ("bad_vllm_ascend_same_expert_twice_on_device.json", "vllm_ascend",
     "layer 0, device 0 holds expert 3 twice"),
])
def test_bad_files_are_refused_with_the_place(file: str, format: str, message: str) -> None:
    for known in ({"num_experts": 6}, {"model": MODEL}, {}):
        with pytest.raises(InputError, match=message) as refused:
            import_plan(PLANS / file, format, num_devices=2, **known)
        assert "\n" not in str(refused.value)


@needs_plans
def test_real_omni_plans_with_uneven_layers(tmp_path: Path) -> None:
    even = import_plan(PLANS / "omni_dsv3_16ranks_prefill.npy", "omni").plan
    assert (even.num_layers, even.num_devices, even.spare_slots) == (58, 16, 0)
    uneven = import_plan(PLANS / "omni_dsv3_32dies_decode_redundant.npy", "omni").plan
    stored = np.load(PLANS / "omni_dsv3_32dies_decode_redundant.npy")
    assert np.array_equal(uneven.replicas_LGE(), stored.transpose(1, 0, 2))
    export_plan(uneven, "omni", tmp_path / "omni.npy")
    assert np.array_equal(np.load(tmp_path / "omni.npy"), stored)
    with pytest.raises(InputError, match=r"device 0 of MoE layer 0 fills 9, most fill 8 .*Nearest"):
        export_plan(uneven, "eplb", tmp_path / "plan.npz")
    assert not (tmp_path / "plan.npz").exists()
    export_plan(uneven, "eplb", tmp_path / "plan.npz", nearest=True)
    back = import_plan(tmp_path / "plan.npz", "eplb", num_devices=32).plan
    assert ((back.replicas_LGE() > 0) >= (uneven.replicas_LGE() > 0)).all() and not back.duplicates


# ---- what an engine cannot hold ---------------------------------------------------------------


@pytest.mark.parametrize("format", ["sglang", "trtllm", "vllm_ascend", "eplb"])
def test_uneven_slots_are_refused_and_the_nearest_plan_named(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan{dict(FILES)[format]}"
    model = ModelSpec(num_layers=1, num_experts=4, top_k=1, layer_indices=(7,), total_layers=8)
    remedy = r"Nearest plan \(2 each\): drop expert 0 from device 1 of MoE layer 0: nearest writes"
    with pytest.raises(InputError, match=remedy):
        export_plan(UNEVEN, format, path, model=model)
    assert not path.exists()
    notes = export_plan(UNEVEN, format, path, model=model, nearest=True)
    assert "1 replicas dropped, 0 added" in notes[0]
    back = import_plan(path, format, num_devices=2, model=model).plan
    assert back.slots.tolist() == [[[0, 1], [2, 3]]]


def test_where_nothing_can_go_the_nearest_plan_fills_up() -> None:
    """Device 1's three experts have no other replica, so device 0 gets the rarest it lacks."""
    plan = Plan(slots=np.array([[[0, 1, -1], [2, 3, 4]]], np.int16), num_experts=5)
    assert nearest_plan(plan, duplicates=True, uneven=False).slots.tolist() == [
        [[0, 1, 2], [2, 3, 4]]
    ]
    assert nearest_plan(plan, duplicates=True, uneven=True) is plan


def test_dropped_copies_are_matched_not_taken_greedily() -> None:
    """Only one choice works: device 0 gives up 1 because device 1 can give up nothing but 0."""
    slots = np.array([[[0, 1, 2], [0, 3, 4], [1, 5, -1], [6, 7, -1], [8, 9, -1]]], np.int16)
    even = nearest_plan(Plan(slots=slots, num_experts=10), duplicates=False, uneven=False)
    assert even.slots[:, :, :2].tolist() == [[[0, 2], [3, 4], [1, 5], [6, 7], [8, 9]]]


@given(plan=even_plans(), holes=st.integers(0, 6), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_nearest_plan_is_holdable_and_changes_least(
    plan: Plan, holes: int, seed: int
) -> None:
    """Even, covering, without duplicates; no further off than filling all holes up."""
    rng = np.random.default_rng(seed)
    slots = plan.slots.copy()
    for _ in range(holes):
        layer, device, slot = (int(rng.integers(n)) for n in slots.shape)
        replicas = (slots[layer] == slots[layer, device, slot]).sum()
        if slots[layer, device, slot] >= 0 and replicas > 1:
            slots[layer, device, slot] = -1
    uneven = Plan(slots=slots, num_experts=plan.num_experts)
    near = nearest_plan(uneven, duplicates=False, uneven=False)
    filled = (near.slots >= 0).sum(axis=2)
    assert filled.min() == filled.max() and near.duplicates == 0
    changed = np.abs(near.replicas_LGE() - uneven.replicas_LGE()).sum()
    assert changed <= (uneven.slots < 0).sum()


@pytest.mark.parametrize("format", ["vllm_ascend", "omni"])
def test_an_expert_twice_on_a_device_is_refused_where_it_corrupts(
    format: str, tmp_path: Path
) -> None:
    path = tmp_path / f"plan{dict(FILES)[format]}"
    with pytest.raises(InputError, match=r"device 0 of MoE layer 0 holds expert 0 twice.*Nearest"):
        export_plan(TWICE, format, path)
    export_plan(TWICE, format, path, nearest=True)
    back = import_plan(path, format, num_experts=3).plan
    assert held(back) == ([[{0, 1}, {1, 2}]] if format == "vllm_ascend" else [[{0}, {1, 2}]])


def test_an_expert_twice_on_a_device_is_told_where_it_is_merely_waste(tmp_path: Path) -> None:
    notes = export_plan(TWICE, "eplb", tmp_path / "plan.npz")
    assert any("already holds: wasted" in note for note in notes)
    found = import_plan(tmp_path / "plan.npz", "eplb", num_devices=2)
    assert found.plan.duplicates == 1
    assert any("already holds: wasted" in note for note in found.notes)


def test_holes_are_closed_up_where_all_devices_fill_as_many(tmp_path: Path) -> None:
    plan = Plan(slots=np.array([[[-1, 0], [1, -1]]], np.int16), num_experts=2)
    export_plan(plan, "eplb", tmp_path / "plan.npz")
    assert np.load(tmp_path / "plan.npz")["phy2log"].tolist() == [[0, 1]]


def test_a_plan_for_another_dispatch_says_how_to_judge_it(tmp_path: Path) -> None:
    notes = export_plan(TOY, "trtllm", tmp_path / "plan.yaml")
    assert any("--dispatch trtllm_round_robin" in note for note in notes)


@pytest.mark.parametrize(("policy", "option"), [
    ("sglang_static", "static and an all-to-all backend"),
    ("sglang_rows", "dynamic --moe-a2a-backend none"), ("even", None),
])
def test_sglang_is_started_with_the_plans_dispatch(
    tmp_path: Path, policy: str, option: str | None
) -> None:
    plan = Plan(slots=TOY.slots, num_experts=TOY.num_experts, dispatch=DispatchSpec(policy=policy))
    start = export_plan(plan, "sglang", tmp_path / "plan.json", model=MODEL)[0]
    assert start.endswith(f"--ep-dispatch-algorithm {option}") if option else (
        "--ep-dispatch-algorithm" not in start
    )


# ---- layers of the model ----------------------------------------------------------------------


def test_sglang_needs_to_know_every_hidden_layer(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for model in (None, MODEL.model_copy(update={"total_layers": None})):
        with pytest.raises(UsageError, match="row for every hidden layer"):
            export_plan(TOY, "sglang", path, model=model)
    export_plan(TOY, "sglang", path, model=MODEL)
    with pytest.raises(InputError, match=r"holds 3 rows; toy has 2 MoE layers \(1-2\) of 5 hidden"):
        import_plan(path, "sglang", num_devices=2,
                    model=MODEL.model_copy(update={"total_layers": 5}))
    found = import_plan(path, "sglang", num_devices=2)
    assert found.plan.num_layers == 3
    assert any("layer 0, perhaps dense" in note for note in found.notes)


def test_trtllm_names_layers_as_the_model_does(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    counted = Plan(slots=TOY.slots, num_experts=6, layer_indices=(0, 1))
    with pytest.raises(UsageError, match="name the model"):
        export_plan(counted, "trtllm", path)
    notes = export_plan(counted, "trtllm", path, model=MODEL)
    assert any("the model's MoE layers, 1 to 2" in note for note in notes)
    assert import_plan(path, "trtllm", num_devices=2).plan.layer_indices == (1, 2)
    other = MODEL.model_copy(update={"layer_indices": (1, 3), "total_layers": 4})
    with pytest.raises(InputError, match="layer 2 is no MoE layer of the model"):
        import_plan(path, "trtllm", num_devices=2, model=other)
    more = MODEL.model_copy(update={"num_layers": 3, "layer_indices": (1, 2, 3)})
    with pytest.raises(InputError, match="layer 3 is missing"):
        import_plan(path, "trtllm", num_devices=2, model=more)
    with pytest.raises(InputError, match="another model"):
        export_plan(TOY, "trtllm", path, model=other)


@pytest.mark.parametrize(("format", "suffix"), FILES)
def test_a_plan_of_another_model_is_refused(format: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan{suffix}"
    export_plan(TOY, format, path, model=MODEL)
    bigger = MODEL.model_copy(update={"num_experts": 8})
    with pytest.raises(InputError, match="2 MoE layers of 8 experts"):
        export_plan(TOY, format, path, model=bigger)
    with pytest.raises(InputError, match=r"another model|expert 6 has no slot"):
        import_plan(path, format, num_devices=2, model=bigger)


# ---- what the caller must say -----------------------------------------------------------------


def test_numbers_that_the_file_lacks_or_contradicts(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    export_plan(TOY, "trtllm", path)
    with pytest.raises(UsageError, match="give num_devices"):
        import_plan(path, "trtllm")
    with pytest.raises(InputError, match="8 slots per layer do not divide over 3 devices"):
        import_plan(path, "trtllm", num_devices=3)
    with pytest.raises(UsageError, match="number of devices, 0, must lie"):
        import_plan(path, "trtllm", num_devices=0)
    with pytest.raises(UsageError, match="leave num_experts out"):
        import_plan(path, "trtllm", num_devices=2, num_experts=5, model=MODEL)
    with pytest.raises(InputError, match="holds expert 5; a layer has experts 0 to 4"):
        import_plan(path, "trtllm", num_devices=2, num_experts=5)
    export_plan(TOY, "omni", tmp_path / "plan.npy")
    with pytest.raises(UsageError, match="is for 2 devices, not 4"):
        import_plan(tmp_path / "plan.npy", "omni", num_devices=4)


def test_formats_and_endings_are_named(tmp_path: Path) -> None:
    for call in (export_plan, import_plan):
        arguments = (TOY, "what", tmp_path / "x") if call is export_plan else (tmp_path, "what")
        with pytest.raises(UsageError, match=", ".join(FORMATS)):
            call(*arguments)
    with pytest.raises(UsageError, match=r"ends in \.npz or \.pt"):
        export_plan(TOY, "eplb", tmp_path / "plan.json")
    with pytest.raises(InputError, match="cannot be written"):
        export_plan(TOY, "eplb", tmp_path / "absent" / "plan.npz")
    with pytest.raises(InputError, match="no such file"):
        import_plan(tmp_path / "absent.json", "sglang", num_devices=2)
    with pytest.raises(InputError, match="a folder"):
        import_plan(tmp_path, "trtllm", num_devices=2)
