"""Draft (MTP) layers: known, numbered after the hidden ones, counted apart."""

from __future__ import annotations

from typing import Any

import pytest

from loadmaster.errors import InputError
from loadmaster.traces.model_spec import DraftLayers, ModelSpec

from .conftest import Write

MODEL: dict[str, Any] = dict(
    model_type="deepseek_v3", torch_dtype="bfloat16", hidden_size=64, moe_intermediate_size=32,
    num_hidden_layers=8, n_routed_experts=16, num_experts_per_tok=4, first_k_dense_replace=3,
)


def draft(write: Write, fields: dict[str, Any]) -> DraftLayers | None:
    return ModelSpec.from_pretrained(write(MODEL | fields)).draft_layers


@pytest.mark.parametrize(("fields", "indices"), [
    ({"num_nextn_predict_layers": 1}, (8,)), ({"num_mtp_layers": 2}, (8, 9)),
    ({"mtp_num_hidden_layers": 1}, (8,)), ({"use_mtp": True, "num_mtp_modules": 3}, (8, 9, 10)),
    ({"n_mtp_layers": 1}, (8,)),
])
def test_they_follow_the_hidden_layers_and_are_like_the_others(
    write: Write, fields: dict[str, Any], indices: tuple[int, ...]
) -> None:
    spec = ModelSpec.from_pretrained(write(MODEL | fields))
    assert spec.num_layers == 5 and spec.total_layers == 8          # counted apart
    assert spec.draft_layers == DraftLayers(layer_indices=indices, num_experts=16, top_k=4)


@pytest.mark.parametrize("fields", [
    {}, {"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": None},
    {"use_mtp": False, "num_mtp_modules": 3},
    {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "mlp"]},
    {"num_nextn_predict_layers": 1, "mtp_num_experts": 1},
    {"num_nextn_predict_layers": 1, "model_type": "mimo_v2_flash"},   # dense by the family's code
])
def test_none_where_there_are_none_or_they_are_dense(write: Write, fields: dict[str, Any]) -> None:
    assert draft(write, fields) is None


@pytest.mark.parametrize("fields", [
    {"num_nextn_predict_layers": 1, "mtp_num_experts": 32, "mtp_num_experts_per_tok": 2},
    {"mtp_config": {"num_layers": 1, "num_nextn_predict_layers": 1, "num_experts": 32,
                    "num_experts_per_tok": 2}},
    {"nextn_n_routed_experts": 32, "nextn_num_experts_per_tok": 2, "num_mtp_layers": 1},
])
def test_experts_of_their_own(write: Write, fields: dict[str, Any]) -> None:
    found = draft(write, fields)
    assert found is not None and (found.num_experts, found.top_k) == (32, 2)


def test_blocks_of_a_pattern_tell_that_they_hold_experts(write: Write) -> None:
    fields = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    found = draft(write, fields)
    assert found is not None and found.layer_indices == (8,)


def test_a_list_that_goes_beyond_the_hidden_layers_names_them(write: Write) -> None:
    """Eight hidden layers, ten entries: the last two are drafts, of which one has experts."""
    kinds = ["dense"] * 3 + ["sparse"] * 5 + ["dense", "sparse"]
    spec = ModelSpec.from_pretrained(write(MODEL | {
        "mlp_layer_types": kinds, "num_nextn_predict_layers": 2}))
    assert spec.own_layer_indices() == (3, 4, 5, 6, 7)
    assert spec.draft_layers is not None and spec.draft_layers.layer_indices == (9,)


@pytest.mark.parametrize("left_alone", ["mtp*", "model.layers.8*", "mtp.layers.0*", "re:.*mtp.*"])
def test_what_a_quantiser_leaves_alone_has_its_own_bytes(write: Write, left_alone: str) -> None:
    found = draft(write, {
        "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", left_alone]},
    })
    assert found is not None and found.bytes_per_expert == 3 * 64 * 32 * 2


def test_they_do_not_change_what_a_plan_is_for(write: Write) -> None:
    with_, without = (
        ModelSpec.from_pretrained(write(MODEL | {"num_nextn_predict_layers": n})) for n in (1, 0)
    )
    assert with_.digest() == without.digest()


def test_an_impossible_number_is_one_line(write: Write) -> None:
    for count in (-1, 10_000):
        with pytest.raises(InputError, match="draft layers"):
            draft(write, {"num_nextn_predict_layers": count})
