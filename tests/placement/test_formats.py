"""Engines' plan files: what goes out comes back, what is wrong is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InfeasibleError, InputError, UsageError
from loadmaster.placement.formats import FORMATS, export_plan, import_plan, nearest_plan
from loadmaster.placement.plan import Plan
from loadmaster.traces.spec import ModelSpec

PLANS = Path(__file__).resolve().parents[3] / "shared" / "data" / "plans"
needs_plans = pytest.mark.skipif(not PLANS.is_dir(), reason=f"plan files not present: {PLANS}")

# The toy of every engine's documentation: layer 0 is dense, 6 experts, 2 ranks of 4 slots.
TOY_MODEL = ModelSpec(
    name="toy", num_layers=2, num_experts=6, top_k=2, layer_indices=(1, 2), total_layers=3
)
TOY = Plan(
    slots=np.array([[[3, 5, 4, 0], [2, 5, 4, 1]], [[0, 1, 2, 3], [4, 5, 0, 3]]]),
    num_experts=6, layer_indices=(1, 2),
)
SUFFIX = {"sglang": "json", "trtllm": "yaml", "vllm_ascend": "json", "eplb": "npz", "omni": "npy"}


def exported(plan: Plan, format: str, folder: Path, suffix: str | None = None) -> Path:
    path = folder / f"plan.{suffix or SUFFIX[format]}"
    export_plan(plan, format, path, model=TOY_MODEL if plan is TOY else None)
    return path


def held(plan: Plan) -> list[list[set[int]]]:
    """Experts of each layer and device, in no order."""
    return [[{int(e) for e in row if e >= 0} for row in layer] for layer in plan.slots]


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_comes_back_as_it_went_out(format: str, tmp_path: Path) -> None:
    path = exported(TOY, format, tmp_path)
    back = import_plan(path, format, num_devices=2, model=TOY_MODEL).plan
    assert back.layer_indices == (1, 2)
    if format == "omni":        # knows no order of slots
        assert held(back) == held(TOY)
    else:
        assert back.same_slots(TOY)


@pytest.mark.parametrize("format", FORMATS)
def test_writing_twice_gives_the_same_bytes(format: str, tmp_path: Path) -> None:
    first = exported(TOY, format, tmp_path).read_bytes()
    assert exported(TOY, format, tmp_path).read_bytes() == first


def test_torch_files_are_read_without_pickle(tmp_path: Path) -> None:
    path = exported(TOY, "eplb", tmp_path, "pt")
    assert import_plan(path, "eplb", num_devices=2, num_experts=6).plan.same_slots(TOY)
    rows = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]])
    torch.save({"physical_to_logical_map": rows}, tmp_path / "sglang.pt")
    plan = import_plan(tmp_path / "sglang.pt", "sglang", num_devices=2).plan
    assert plan.slots.tolist() == [[[0, 1, 2, 3], [4, 5, 0, 1]]]
    torch.save({"phy2log": print}, tmp_path / "evil.pt")      # a reference to code
    with pytest.raises(InputError, match="not a torch file of plain tensors"):
        import_plan(tmp_path / "evil.pt", "eplb", num_devices=2)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_even_plan_without_duplicates_survives_every_format(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    devices = data.draw(st.integers(1, 3))
    width = data.draw(st.integers(1, 3))
    layers = data.draw(st.integers(1, 2))
    experts = data.draw(st.integers(width, devices * width))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    slots = np.stack([_layer(rng, experts, devices, width) for _ in range(layers)])
    plan = Plan(slots=slots, num_experts=experts)
    folder = tmp_path_factory.mktemp("plans")
    for format in FORMATS:
        back = import_plan(
            exported(plan, format, folder), format, num_devices=devices, num_experts=experts
        ).plan
        assert held(back) == held(plan)


def _layer(rng: np.random.Generator, experts: int, devices: int, width: int) -> np.ndarray:
    """Every expert somewhere, no device with an expert twice."""
    slots = np.full((devices, width), -1)
    for expert in range(experts):       # deal experts round the devices, then fill up
        slots[expert % devices, expert // devices] = expert
    for g, c in np.argwhere(slots < 0):
        slots[g, c] = rng.choice(np.setdiff1d(np.arange(experts), slots[g]))
    return slots


# ---- the files that came with the project's data --------------------------------------------


@needs_plans
@pytest.mark.parametrize(
    ("file", "format"),
    [("toy_sglang.json", "sglang"), ("toy_trtllm.yaml", "trtllm"),
     ("toy_vllm_ascend.json", "vllm_ascend")],
)
def test_toy_files_mean_what_they_should(file: str, format: str, tmp_path: Path) -> None:
    meaning = json.loads((PLANS / "toy_meaning.json").read_text())
    plan = import_plan(PLANS / file, format, num_devices=2, model=TOY_MODEL).plan
    for layer, name in enumerate(("1", "2")):
        assert plan.slots[layer].reshape(-1).tolist() == meaning["expert_of_slot"][name]
        assert plan.replicas_LE[layer].tolist() == meaning["replicas"][name]
    again = import_plan(exported(plan, format, tmp_path), format, num_devices=2, model=TOY_MODEL)
    assert again.plan.same_slots(plan)


@needs_plans
@pytest.mark.parametrize(
    ("file", "format", "message"),
    [
        ("bad_sglang_extra_key.json", "sglang", 'key "made_by"'),
        ("bad_sglang_missing_expert.json", "sglang", "layer 1 has no slot for expert 5"),
        ("bad_sglang_short_row.json", "sglang", "layer 1 has 6 slots, layer 0 has 8"),
        ("bad_trtllm_short_list.yaml", "trtllm", "layer 2 lists 7 slots, num_slots says 8"),
        ("bad_vllm_ascend_same_expert_twice_on_device.json", "vllm_ascend",
         "layer 0, device 0 lists expert 3 twice"),
    ],
)
def test_bad_files_are_refused_with_the_place(file: str, format: str, message: str) -> None:
    for known in ({"num_experts": 6}, {}):
        with pytest.raises(InputError, match=message):
            import_plan(PLANS / file, format, num_devices=2, **known)  # type: ignore[arg-type]


@needs_plans
def test_real_omni_plans_with_uneven_layers(tmp_path: Path) -> None:
    even = import_plan(PLANS / "omni_dsv3_16ranks_prefill.npy", "omni").plan
    assert (even.num_layers, even.num_devices, even.spare_slots) == (58, 16, 0)
    uneven = import_plan(PLANS / "omni_dsv3_32dies_decode_redundant.npy", "omni").plan
    stored = np.load(PLANS / "omni_dsv3_32dies_decode_redundant.npy")
    assert np.array_equal(uneven.copies_LGE(), stored.transpose(1, 0, 2))
    assert uneven.slots_per_device == 9 and (uneven.slots < 0).any()
    back = tmp_path / "omni.npy"
    export_plan(uneven, "omni", back)
    assert np.array_equal(np.load(back), stored)
    with pytest.raises(InputError, match=r"9 filled slots on every device .* nearest plan"):
        export_plan(uneven, "sglang", tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


# ---- what an engine cannot hold -------------------------------------------------------------


def test_the_nearest_plan_fills_empty_slots_and_keeps_the_rest(tmp_path: Path) -> None:
    plan = Plan(slots=np.array([[[0, 1, -1], [2, 3, 0]]]), num_experts=4)
    notes = export_plan(plan, "trtllm", tmp_path / "plan.yaml", nearest=True)
    assert any("1 slots differ" in n for n in notes)
    back = import_plan(tmp_path / "plan.yaml", "trtllm", num_devices=2, num_experts=4).plan
    assert back.slots.tolist() == [[[0, 1, 2], [2, 3, 0]]]     # 2: fewest copies, lowest id
    assert nearest_plan(plan, duplicates=True, uneven=True) is plan


@pytest.mark.parametrize("format", ["vllm_ascend", "omni"])
def test_duplicates_are_refused_where_they_would_corrupt(format: str, tmp_path: Path) -> None:
    plan = Plan(slots=np.array([[[0, 0], [1, 2]]]), num_experts=3)
    with pytest.raises(InputError, match="device 0 holds expert 0 twice in layer 0"):
        export_plan(plan, format, tmp_path / "plan")
    export_plan(plan, format, tmp_path / "plan", nearest=True)
    back = import_plan(tmp_path / "plan", format, num_experts=3).plan
    assert held(back) == [[{0, 1}, {1, 2}]]


def test_more_slots_than_experts_cannot_be_told_apart() -> None:
    plan = Plan(slots=np.array([[[0, 1, -1]]]), num_experts=2)
    with pytest.raises(InfeasibleError, match="more slots"):
        nearest_plan(plan, duplicates=False, uneven=False)


def test_sglang_rows_cover_dense_layers_and_trtllm_keys_name_the_model_layers(
    tmp_path: Path,
) -> None:
    rows = json.loads(exported(TOY, "sglang", tmp_path).read_text())
    assert list(rows) == ["physical_to_logical_map"]
    assert rows["physical_to_logical_map"][0] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert len(rows["physical_to_logical_map"]) == 3
    document = yaml.safe_load(exported(TOY, "trtllm", tmp_path).read_text())
    assert sorted(document) == [
        "initial_global_assignments", "layer_updates_per_iter", "num_slots"
    ]
    assert list(document["initial_global_assignments"]) == [1, 2]


# ---- files that are not what they say -------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("sglang", "{", "not JSON"),
        ("sglang", "[]", "needs the key"),
        ("sglang", '{"physical_to_logical_map": []}', "list of rows"),
        ("sglang", '{"physical_to_logical_map": [[0, true]]}', "slot 1: True is not a whole"),
        ("sglang", '{"physical_to_logical_map": [[0, 1, 9]]}', "3 slots do not divide over 2"),
        ("sglang", '{"physical_to_logical_map": [[0, -1]]}', "slot 1 names expert -1"),
        ("trtllm", "num_slots: 2", "holds no layer"),
        ("trtllm", "initial_global_assignments: {3: [0, 1]}\nnum_slots: two", "num_slots must be"),
        ("trtllm", "initial_global_assignments: {3: [0, 1]}\nnum_slots: 2\nep_size: 2", "ep_size"),
        ("trtllm", "initial_global_assignments: {3: [0, 1], 3: [1, 0]}\nnum_slots: 2", "twice"),
        ("trtllm", "initial_global_assignments: {a: [0, 1]}\nnum_slots: 2", "not a layer index"),
        ("vllm_ascend", '{"layer_list": []}', "no layer_list"),
        ("vllm_ascend", '{"moe_layer_count": 2, "layer_list": [{}]}', "moe_layer_count 2"),
    ],
)
def test_malformed_text_is_one_clear_error(
    format: str, content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        import_plan(path, format, num_devices=2)


def test_vllm_ascend_ids_must_agree_with_positions(tmp_path: Path) -> None:
    path = exported(TOY, "vllm_ascend", tmp_path)
    document = json.loads(path.read_text())
    document["layer_list"][1]["device_list"].reverse()
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"layer 1, device 0 has device_id 1"):
        import_plan(path, "vllm_ascend", num_experts=6)


def test_eplb_maps_must_agree(tmp_path: Path) -> None:
    path = exported(TOY, "eplb", tmp_path)
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["logcnt"] = arrays["logcnt"][:, ::-1]
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="logcnt does not count"):
        import_plan(path, "eplb", num_devices=2, num_experts=6)


def test_omni_values_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "plan.npy"
    for array, message in (
        (np.zeros((2, 3)), "rank, layer, expert"),
        (np.full((1, 1, 2), 2), "values other than 0 and 1"),
        (np.array([[[1, 0]]]), "no rank holds expert 1"),
    ):
        np.save(path, array)
        with pytest.raises(InputError, match=message):
            import_plan(path, "omni")


def test_what_the_file_does_not_say_must_be_said(tmp_path: Path) -> None:
    path = exported(TOY, "trtllm", tmp_path)
    with pytest.raises(UsageError, match="--devices"):
        import_plan(path, "trtllm", num_experts=6)
    with pytest.raises(UsageError, match="unknown plan format 'vllm'"):
        import_plan(path, "vllm")
    with pytest.raises(InputError, match="no such plan file"):
        import_plan(tmp_path / "none", "sglang", num_devices=2)
    imported = import_plan(path, "trtllm", num_devices=2)
    assert any("took 6" in note for note in imported.notes)


def test_trtllm_layers_must_be_the_models(tmp_path: Path) -> None:
    path = exported(TOY, "trtllm", tmp_path)
    other = TOY_MODEL.model_copy(update={"num_layers": 3, "layer_indices": (1, 2, 3)})
    with pytest.raises(InputError, match="MoE layer 3 of toy is missing"):
        import_plan(path, "trtllm", num_devices=2, model=other)
