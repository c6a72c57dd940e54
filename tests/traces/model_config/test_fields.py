"""One quantity under many names, in nested parts, one for each layer; and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from loadmaster.errors import InputError
from loadmaster.traces.model_spec import ModelSpec

from .conftest import Write

SIZES: dict[str, Any] = dict(
    model_type="mixtral", num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
    hidden_size=32, intermediate_size=64, torch_dtype="bfloat16",
)


def renamed(**names: str) -> dict[str, Any]:
    """The sizes with some fields under other names."""
    return {names.get(key, key): value for key, value in SIZES.items()}


@pytest.mark.parametrize("fields", [
    renamed(num_local_experts=name) for name in (
        "n_routed_experts", "num_experts", "moe_num_experts", "moe_num_primary_experts",
        "num_moe_experts", "num_routed_experts")
] + [
    renamed(num_experts_per_tok=name) for name in (
        "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
        "experts_top_k", "moe_num_active_primary_experts", "moe_router_topk", "experts_per_token",
        "n_activated_experts", "num_selected_experts")
] + [
    renamed(num_hidden_layers=name) for name in ("n_layers", "num_layers", "n_layer")
] + [renamed(hidden_size=name) for name in ("d_model", "dim", "n_embd")] + [
    renamed(intermediate_size=name) for name in (
        "moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size",
        "expert_hidden_dim", "moe_inter_dim", "ffn_hidden_size", "expert_intermediate_size")
])
def test_every_name_means_the_same(write: Write, fields: dict[str, Any]) -> None:
    spec = ModelSpec.from_pretrained(write(fields))
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (4, 8, 2)
    assert (spec.hidden, spec.intermediate, spec.notes) == (32, 64, ())


@pytest.mark.parametrize("part", [
    "text_config", "llm_config", "language_config", "thinker_config", "decoder_config",
    "a_part_nobody_knows",
])
def test_the_language_models_part_is_found(write: Write, part: str) -> None:
    """Its own fields come before those around it."""
    inner = SIZES | {"num_nextn_predict_layers": 0}
    spec = ModelSpec.from_pretrained(write({
        "model_type": "wrapper", "hidden_size": 999, "vision_config": {"num_experts": 60},
        part: inner,
    }))
    assert (spec.num_experts, spec.hidden, spec.num_layers) == (8, 32, 4)


def test_parts_within_parts(write: Write) -> None:
    spec = ModelSpec.from_pretrained(write({
        "model_type": "omni", "talker_config": {"text_config": {"num_experts": 4}},
        "thinker_config": {"model_type": "thinker", "text_config": SIZES},
    }))
    assert (spec.num_experts, spec.num_layers) == (8, 4)


def test_a_part_about_experts_alone_leaves_the_rest_outside(write: Write) -> None:
    """Its `top_k` chooses experts; the one outside samples text."""
    spec = ModelSpec.from_pretrained(write({
        "architecture": "MixtralForCausalLM", "dtype": "bfloat16", "num_hidden_layers": 4,
        "hidden_size": 32, "intermediate_size": 64, "top_k": 50,
        "moe": {"num_experts": 8, "top_k": 2},
    }))
    assert (spec.num_experts, spec.top_k, spec.hidden) == (8, 2, 32)


@pytest.mark.parametrize("latent", [
    "moe_latent_size", "routed_expert_hidden_size", "moe_hidden_size",
])
def test_a_latent_width_is_what_travels(write: Write, latent: str) -> None:
    spec = ModelSpec.from_pretrained(write(SIZES | {latent: 16}))
    assert spec.hidden == 16 and spec.bytes_per_expert_E()[0] == 3 * 16 * 64 * 2


@pytest.mark.parametrize(("fields", "shared"), [
    ({}, 0), ({"n_shared_experts": 2}, 2), ({"num_shared_expert": [1, 1, 1, 1]}, 1),
    ({"shared_expert_intermediate_size": 32}, 1), ({"shared_intermediate_size": 0}, 0),
    ({"share_expert_dim": 1280}, 1), ({"n_shared_experts": None}, 0),
    ({"moe_num_shared_experts": 0, "shared_expert_intermediate_size": 32}, 0),
])
def test_shared_experts_are_counted_or_told_by_their_width(
    write: Write, fields: dict[str, Any], shared: int
) -> None:
    assert ModelSpec.from_pretrained(write(SIZES | fields)).num_shared_experts == shared


def test_of_a_list_per_layer_most_decide_and_a_note_says_the_rest(write: Write) -> None:
    same = ModelSpec.from_pretrained(write(SIZES | {"moe_intermediate_size": [48] * 4}))
    assert same.intermediate == 48 and same.notes == ()
    mixed = ModelSpec.from_pretrained(write(SIZES | {"moe_intermediate_size": [64, 48, 48, 48]}))
    assert mixed.intermediate == 48
    assert mixed.notes == (
        "intermediate: moe_intermediate_size differs from layer to layer (48 to 64); 48, that of 3 "
        "of 4 layers, is taken for all",
    )


def test_experts_may_differ_from_layer_to_layer(write: Write) -> None:
    """A pruned model: what most of its MoE layers have, of those alone."""
    spec = ModelSpec.from_pretrained(write(SIZES | {
        "num_local_experts": [1, 8, 6, 6], "mlp_layer_types": ["dense", *["sparse"] * 3]}))
    assert (spec.num_layers, spec.num_experts) == (3, 6)
    assert spec.notes == (
        "experts: num_local_experts differs from layer to layer (6 to 8); 6, that of 2 of 3 "
        "layers, is taken for all",
    )


def test_of_a_list_per_kind_of_token_the_first_is_texts(write: Write) -> None:
    spec = ModelSpec.from_pretrained(write(SIZES | {
        "num_local_experts": None, "moe_num_experts": [8, 8], "moe_intermediate_size": [48, 16]}))
    assert (spec.num_experts, spec.intermediate) == (8, 48)
    assert spec.notes[0].startswith("intermediate: moe_intermediate_size lists [48, 16]")


@pytest.mark.parametrize(("fields", "message"), [
    ({"num_local_experts": 1}, "not a mixture of experts"),
    ({"num_local_experts": 0}, "not a mixture of experts"),
    ({"num_local_experts": None}, "not a mixture of experts"),
    ({"enable_moe_block": False}, "not a mixture of experts"),
    ({"num_local_experts": -8}, "not a mixture of experts"),
    ({"num_local_experts": "8"}, "num_local_experts is the text '8', not a number"),
    ({"num_local_experts": 8.5}, "8.5 is not a whole number"),
    ({"num_experts": 16}, "num_local_experts 8 and num_experts 16, which mean the same"),
    ({"moe_topk": 4}, "num_experts_per_tok 2 and moe_topk 4, which mean the same"),
    ({"num_experts_per_tok": 9}, "top_k 9 is larger than num_experts 8"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok.*is set"),
    ({"num_experts_per_tok": -2}, "top_k: Input should be greater than 0"),
    ({"hidden_size": -32}, "hidden: Input should be greater than 0"),
    ({"intermediate_size": 0}, "intermediate: Input should be greater than 0"),
    ({"n_group": 3}, "8 experts do not divide into 3 groups"),
    ({"n_group": 4, "topk_group": 5}, "5 of 4 expert groups"),
    ({"n_group": -2, "topk_group": 1}, "expert groups|num_expert_groups"),
])
def test_sizes_that_cannot_be_are_one_line(
    write: Write, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ModelSpec.from_pretrained(write(SIZES | fields))
    assert "\n" not in str(caught.value)
