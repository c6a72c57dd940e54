"""Which layers are MoE: lists first, then numbers, then what the family's code does, else asked."""

from __future__ import annotations

from typing import Any

import pytest

from loadmaster.errors import InputError
from loadmaster.traces.model_spec import ModelSpec

from .conftest import Write

SIZES: dict[str, Any] = dict(
    num_hidden_layers=8, num_experts=16, num_experts_per_tok=2, hidden_size=32,
    moe_intermediate_size=64, dtype="bfloat16",
)
UNKNOWN = SIZES | dict(model_type="nobody_knows")


def layers(write: Write, fields: dict[str, Any], **how: Any) -> tuple[int, ...]:
    return ModelSpec.from_pretrained(write(fields), **how).own_layer_indices()


@pytest.mark.parametrize("listed", [
    {"mlp_layer_types": ["dense", "dense", "sparse", "sparse", "dense", *["sparse"] * 3]},
    {"mlp_layer_types": ["dense", "dense", "hash_moe", "moe", "dense", *["moe"] * 3]},
    {"layers_block_type": ["mamba", "mlp", "moe", "moe", "attention", *["moe"] * 3]},
    {"hybrid_override_pattern": "M-EE*EEE"},
    {"moe_layer_freq": [0, 0, 1, 1, 0, 1, 1, 1]},
    {"moe_layer_freq": "[0]*2+[1]*2+[0]+[1]*3"},
    {"moe_layer_freq": "([0, 0] + [1, 1] + [0]+3*[1])"},
    {"is_moe_layer": [False, False, True, True, False, True, True, True]},
    {"moe_layers": [2, 3, 5, 6, 7]}, {"moe_layers_enum": "2,3,5,6,7"},
    {"moe_layers_enum": [2, 3, 5, 6, 7]}, {"moe_layers": [0, 0, 1, 1, 0, 1, 1, 1]},
    {"interleave": [0, 0, 1, 1, 0, 1, 1, 1]}, {"interleave": [2, 3, 5, 6, 7]},
    {"moe_layer_layout": [0, 0, 1, 1, 0, 1, 1, 1]},
    {"sparse_mlp_layer_flags": [0, 0, 1, 1, 0, 1, 1, 1]},        # a name of nobody's
    {"mlp_only_layers": [0, 1, 4]},
])
def test_a_list_tells_of_any_model(write: Write, listed: dict[str, Any]) -> None:
    """Whether the family is known or not, and whatever its own rule would say."""
    for model_type in ("nobody_knows", "mixtral", "deepseek_v3"):
        if "mlp_only_layers" in listed and model_type == "deepseek_v3":
            continue            # not a list of the MoE ones: that family's first three stay dense
        assert layers(write, SIZES | listed | {"model_type": model_type}) == (2, 3, 5, 6, 7)


@pytest.mark.parametrize(("numbers", "wanted"), [
    ({"first_k_dense_replace": 3}, range(3, 8)), ({"num_dense_layers": 2}, range(2, 8)),
    ({"n_dense_first_layers": 2, "interleave_moe_layer_step": 1}, range(2, 8)),
    ({"n_dense_layers": 1}, range(1, 8)), ({"first_k_dense_replace": 0}, range(8)),
    ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4, 6)),
    ({"moe_layer_freq": 1}, range(8)), ({"route_every_n": 2}, (0, 2, 4, 6)),
    ({"decoder_sparse_step": 2}, (1, 3, 5, 7)), ({"interleave_moe_layer_step": 2}, (1, 3, 5, 7)),
    ({"moe_layer_frequency": 4}, (3, 7)), ({"decoder_sparse_step": 1, "mlp_only_layers": []},
                                           range(8)),
    ({"expert_layer_period": 3, "expert_layer_offset": 2}, (2, 5)),
    ({"moe_layer_start_index": 2, "moe_layer_end_index": 6, "moe_layer_interval": 2}, (3, 5)),
    ({"moe_layer_start_index": 1, "moe_layer_end_index": -1}, range(1, 8)),
    ({"moe_every_n_layer": 2, "moe_layer_offset": 3}, (3, 5, 7)),
    ({"moe_every_n_layers": 2}, (1, 3, 5, 7)),
    ({"moe_layer_start_index": [1, 1], "moe_layer_end_index": [5, 4]}, range(1, 6)),
])
def test_numbers_tell_of_any_model(write: Write, numbers: dict[str, Any], wanted: Any) -> None:
    spec = ModelSpec.from_pretrained(write(UNKNOWN | numbers))
    assert spec.own_layer_indices() == tuple(wanted) and spec.notes == ()
    assert spec.total_layers == 8


@pytest.mark.parametrize(("names", "wanted"), [
    ({"architectures": ["Grok1ForCausalLM"], "model_type": "git"}, range(8)),
    ({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "mine"}, range(3, 8)),
    ({"architectures": ["MiniMaxM2ForCausalLM"]}, range(8)),
    ({"architectures": ["LongcatFlashNgramForCausalLM"]}, range(8)),
    ({"architectures": ["HunYuanMoEV1ForCausalLM"]}, range(8)),
    ({"architectures": ["Glm4MoeForConditionalGeneration"]}, range(1, 8)),
    ({"architecture": "MixtralForCausalLM"}, range(8)),
    # the model's own type says more than the class it borrows
    ({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "mixtral"}, range(8)),
])
def test_architectures_tell_the_family(write: Write, names: dict[str, Any], wanted: Any) -> None:
    spec = ModelSpec.from_pretrained(write(SIZES | names))
    assert spec.own_layer_indices() == tuple(wanted) and spec.notes == ()


@pytest.mark.parametrize(("model_type", "sibling", "wanted"), [
    ("deepseek_v41_text", "deepseek_v4", range(8)), ("qwen7_moe", "qwen3_moe", range(8)),
    ("glm4_moe_air", "glm4_moe", range(1, 8)), ("deepseek_v32_exp", "deepseek_v32", range(3, 8)),
])
def test_a_sibling_is_read_alike_and_a_note_says_so(
    write: Write, model_type: str, sibling: str, wanted: Any
) -> None:
    spec = ModelSpec.from_pretrained(write(SIZES | {"model_type": model_type}))
    assert spec.own_layer_indices() == tuple(wanted)
    (note,) = spec.notes
    assert note.startswith(f"layers: model_type '{model_type}' is not known")
    assert f"its sibling {sibling}," in note and "--moe-layers" in note


@pytest.mark.parametrize("model_type", ["nobody_knows", "deepseek_v5", "", "step9"])
def test_what_nothing_tells_is_one_question_with_its_answer(
    write: Write, model_type: str
) -> None:
    """Versions of a family that differ among themselves tell nothing of the next one."""
    fields = SIZES | {"model_type": model_type}
    with pytest.raises(InputError, match=r"16 experts, top-k 2, 8 layers.*moe_layers: 0-7") as no:
        layers(write, fields)
    assert "\n" not in str(no.value) and "--moe-layers: 0-7" in no.value.typed
    assert layers(write, fields, moe_layers="1-7/2") == (1, 3, 5, 7)


def test_the_answer_beats_everything_and_must_fit(write: Write) -> None:
    deepseek = SIZES | {"model_type": "deepseek_v3"}
    assert layers(write, deepseek, moe_layers="1-7") == tuple(range(1, 8))
    with pytest.raises(InputError, match=r"has layers 0 to 7, not layer 8: .*moe_layers='3-8'"):
        layers(write, deepseek, moe_layers="3-8")
    with pytest.raises(InputError, match="neither a number nor a range"):
        layers(write, deepseek, moe_layers="most")


@pytest.mark.parametrize(("fields", "message"), [
    ({"mlp_layer_types": ["sparse"] * 5}, "mlp_layer_types lists 5 layers, but the model has 8"),
    ({"moe_layer_freq": [1] * 7}, "moe_layer_freq lists 7 layers"),
    ({"moe_layer_freq": "[1]*7+__import__('os')"}, "no list of layers"),
    ({"moe_layer_freq": "[1]*99999999"}, "repeats too often"),
    ({"moe_layer_freq": 0}, "cannot be read"), ({"moe_layer_freq": "2"}, "cannot be read"),
    ({"first_k_dense_replace": -1}, "negative"), ({"first_k_dense_replace": 8}, "no layer is MoE"),
    ({"num_hidden_layers": 0}, "num_hidden_layers.*is set"),
    ({"num_hidden_layers": 7.5}, "not a whole number"),
    ({"num_hidden_layers": 10**9}, "at most"),
])
def test_fields_that_contradict_or_say_nothing_are_one_line(
    write: Write, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        layers(write, UNKNOWN | fields)
    assert "\n" not in str(caught.value)


def test_encoder_and_decoder_are_numbered_one_after_the_other(write: Write) -> None:
    """Switch: every second layer of both sides; NLLB: every fourth."""
    switch = dict(model_type="switch_transformers", d_model=64, d_ff=128, num_layers=4,
                  num_decoder_layers=4, num_experts=8, num_sparse_encoder_layers=2,
                  num_sparse_decoder_layers=2, is_gated_act=False, dtype="float32")
    spec = ModelSpec.from_pretrained(write(switch))
    assert spec.own_layer_indices() == (1, 3, 5, 7) and spec.top_k == 1
    assert spec.bytes_per_expert_E()[0] == 2 * 64 * 128 * 4
    assert spec.notes[0].startswith("layers: an encoder of 4 layers and a decoder of 4")
    nllb = dict(model_type="nllb-moe", d_model=64, encoder_ffn_dim=128, encoder_layers=8,
                decoder_layers=8, num_experts=8, encoder_sparse_step=4, decoder_sparse_step=4)
    assert layers(write, nllb) == (3, 7, 11, 15)


def test_router_choices_without_weights_are_counted_apart(write: Write) -> None:
    """LongCat: experts that only pass the token on; and 28 layers, whatever a half layer is."""
    spec = ModelSpec.from_pretrained(write(dict(
        model_type="longcat_flash", num_layers=28, num_hidden_layers=56, n_routed_experts=512,
        moe_topk=12, zero_expert_num=256, hidden_size=6144, expert_ffn_hidden_size=2048,
        torch_dtype="bfloat16")))
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (28, 512, 12)
    assert spec.notes == (
        "experts: the router also chooses among 256 zero-computation experts (ids 512 to 767), "
        "which have no weights and never leave a rank",
    )
