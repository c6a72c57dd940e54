"""Engines' plan files that are not what they say: one line, with place and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.formats import export_plan, import_plan

from .engine_files import FILES, MODEL, TOY, toy_document, write

ROWS = '{"physical_to_logical_map": %s}'
BALANCER = "initial_global_assignments: %s\nlayer_updates_per_iter: 0\nnum_slots: 2\n"


@pytest.mark.parametrize(("format", "content", "message"), [
    ("sglang", "{", "not JSON"),
    ("sglang", "\udcff", "as text"),
    ("sglang", "[" * 100_000, "not JSON"),
    ("sglang", "[]", "must be a mapping"),
    ("sglang", '{"logical_count": [[1, 2]]}', "holds loads"),
    ("sglang", ROWS % "[]", "must be a list of layers"),
    ("sglang", ROWS % "[[0, true]]", "layer 0, slot 1: True is no expert id"),
    ("sglang", ROWS % '[[0, "1"]]', "layer 0, slot 1: '1' is no expert id"),
    ("sglang", ROWS % "[[0, 1.0]]", "slot 1: 1.0 is no expert id"),
    ("sglang", ROWS % "[[0, -1]]", "slot 1: -1 is no expert id"),
    ("sglang", ROWS % "[[0, NaN]]", "NaN is no number"),
    ("sglang", ROWS % "[[0, 1e999]]", "slot 1: inf is no expert id"),
    ("sglang", ROWS % f"[[0, {10**30}]]", "slot 1: a number beyond 64 bits"),
    ("sglang", ROWS % f"[[0, {'9' * 5000}]]", "not JSON"),
    ("sglang", '{"physical_to_logical_map": [[0]], "physical_to_logical_map": [[1]]}', "twice"),
    ("trtllm", "num_slots: [", "not YAML"),
    ("trtllm", "!!python/object/apply:os.getcwd []", "not YAML"),
    ("trtllm", "num_slots: 2\nlayer_updates_per_iter: 1", "no plan to import"),
    ("trtllm", BALANCER % "{}", "must map layers to slots"),
    ("trtllm", BALANCER % "{3: [0, 1], 3: [1, 0]}", "'3' is given twice"),
    ("trtllm", BALANCER % "{a: [0, 1]}", "whole number from 0, not 'a'"),
    ("trtllm", BALANCER % "{? [1] : [0, 1]}", "not YAML"),
    ("trtllm", BALANCER % "{3: [0, .nan]}", "layer 3, slot 1: nan is no expert id"),
    ("trtllm", BALANCER % f"{{3: [0, 0x{'f' * 5000}]}}", "a number beyond 64 bits"),
    ("trtllm", (BALANCER % "{3: [0, 1]}") + "ep_size: 2", "'ep_size' must go"),
    ("trtllm", "initial_global_assignments: {3: [0, 1]}", "lacks the key 'num_slots'"),
    ("trtllm", (BALANCER % "{3: [0, 1]}") + "mode: per_iteration", "takes no plan"),
    ("trtllm", (BALANCER % "{3: [0, 1]}").replace("2", "two"), "num_slots: must be a whole"),
    ("vllm_ascend", '{"moe_layer_count": 0, "layer_list": []}', "layer_list must be a list"),
    ("vllm_ascend", '{"moe_layer_count": 2, "layer_list": [{}]}', "moe_layer_count is 2, but"),
    ("vllm_ascend", '{"moe_layer_count": 1, "layer_list": [3]}', "MoE layer 0: must be a mapping"),
])
def test_malformed_text_is_one_clear_line(
    format: str, content: str, message: str, tmp_path: Path
) -> None:
    path = write(format, "", tmp_path)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message) as refused:
        import_plan(path, format, num_devices=2)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


Edit = Callable[[Any], Any]


@pytest.mark.parametrize(("edit", "message"), [
    (lambda layers: layers[1]["device_list"].reverse(), "layer 1: device_id is 0 at position 1"),
    (lambda layers: layers[0].update(layer_id=5), "layer_id is 1 at position 1, after 5"),
    (lambda layers: layers[1]["device_list"].pop(), "device_count is 2, but device_list holds 1"),
    (lambda layers: layers[0]["device_list"][1]["device_expert"].pop(),
     "layer 0, device 1 holds 3 experts, device 0 holds 4"),
    (lambda layers: layers[0]["device_list"][1].pop("device_expert"), "lacks the key"),
    (lambda layers: (layers[1].update(device_count=1), layers[1]["device_list"].pop()),
     "layer 1 has 1 devices, layer 0 has 2"),
])
def test_vllm_ascend_positions_and_counts_must_agree(
    edit: Edit, message: str, tmp_path: Path
) -> None:
    document = toy_document("vllm_ascend", tmp_path)
    edit(document["layer_list"])
    with pytest.raises(InputError, match=message):
        import_plan(write("vllm_ascend", document, tmp_path), "vllm_ascend")


def _swapped(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array[:, ::-1].copy()


@pytest.mark.parametrize(("name", "change", "message"), [
    ("logcnt", _swapped, "MoE layer 0, expert 0: logcnt says 2 replicas, phy2log holds 1"),
    ("logcnt", lambda a: a[:1], "logcnt has 1 layers of 6 experts"),
    ("logcnt", lambda a: a.astype(float), "whole numbers"),
    ("log2phy", _swapped, "MoE layer 0, expert 0: log2phy does not name the slots"),
    ("log2phy", lambda a: a[:, :5], "log2phy has 2 layers of 5 experts"),
    ("phy2log", lambda a: a - 1, "MoE layer 0, slot 3: -1 is no expert id"),
    ("phy2log", lambda a: a[0], r"phy2log: must be whole numbers \[layer, slot\]"),
    ("phy2log", lambda a: a.astype(np.uint64) + np.uint64(2**63), "beyond 63 bits"),
])
def test_eplb_tensors_must_agree(name: str, change: Edit, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    export_plan(TOY, "eplb", path)
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(arrays | {name: change(arrays[name])}))
    with pytest.raises(InputError, match=message):
        import_plan(path, "eplb", num_devices=2)


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((2, 3), int), r"\[rank, layer, expert\]"),
    (np.full((1, 1, 2), np.nan), "whole numbers"),
    (np.array([[[1, 2]]]), "rank 0, MoE layer 0, expert 1 is 2"),
    (np.array([[[1, 0]]]), "MoE layer 0: expert 1 has no slot"),
    (np.ones((1, 1, 40_000), np.int8), "num_experts 40000"),
    (np.array([[[{}]]]), "not numpy's"),
])
def test_omni_values_and_shapes(array: npt.NDArray[Any], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "plan.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        import_plan(tmp_path / "plan.npy", "omni")


@pytest.mark.parametrize(("format", "suffix"), FILES)
@pytest.mark.parametrize("keep", [0, 3, 40])
def test_a_file_cut_short_is_refused(format: str, suffix: str, keep: int, tmp_path: Path) -> None:
    path = tmp_path / f"plan{suffix}"
    export_plan(TOY, format, path, model=MODEL)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=str(path)) as refused:
        import_plan(path, format, num_devices=2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("format", "key"), [
    ("sglang", "physical_to_logical_map"), ("eplb", "phy2log"),
])
def test_torch_files_never_run_code(format: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.pt"
    torch.save({key: print}, path)
    with pytest.raises(InputError, match=r"not a \.pt file of tensors alone") as caught:
        import_plan(path, format, num_devices=2)
    torch.save({key: torch.tensor([[0.0, 1.0]])}, path)
    with pytest.raises(InputError, match="must be whole numbers"):
        import_plan(path, format, num_devices=2)
    assert "weights_only" not in str(caught.value)      # torch advises to run the code


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-2, 9), max_size=9), st.dictionaries(st.text(max_size=3), st.integers()),
)


@given(data=st.data(), format=st.sampled_from(["sglang", "trtllm", "vllm_ascend"]))
@settings(max_examples=100, deadline=None)
def test_junk_anywhere_is_a_plan_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, format: str
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    document = toy_document(format, folder)
    place = document
    while True:     # walk down to somewhere, then put junk there
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict)
                                        else range(len(place))))
        below = place[key]
        if not isinstance(below, (dict, list)) or data.draw(st.booleans()):
            break
        place = below
    place[key] = data.draw(JUNK)
    path = folder / f"file{dict(FILES[::-1])[format]}"
    path.write_text(yaml.safe_dump(document) if format == "trtllm" else json.dumps(document))
    try:
        found = import_plan(path, format, num_devices=2)
    except (InputError, UsageError) as error:
        assert "\n" not in str(error)
    else:
        assert (found.plan.replicas_LE >= 1).all()
