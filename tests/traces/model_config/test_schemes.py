"""Every way that quantisers say how experts are stored, with the bytes that it means.

The model is DeepSeek-V3's shape: 58 layers, an expert is 3 x 7168 x 2048 weights. A figure is bytes
per weight with the scales of groups and zero points, reckoned here from the format.
"""

from __future__ import annotations

from typing import Any

import pytest

from loadmaster.errors import InputError
from loadmaster.traces.model_spec import ModelSpec

from .conftest import Write

WEIGHTS = 3 * 7168 * 2048
MODEL = dict(
    model_type="deepseek_v3", torch_dtype="bfloat16", hidden_size=7168, moe_intermediate_size=2048,
    num_hidden_layers=61, n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3,
)
PLAIN, FP8, NVFP4, MXFP4, MXFP8 = 2.0, 1.0, 0.5 + 1 / 16, 0.5 + 1 / 32, 1 + 1 / 32
BLOCKS = 1 + 4 / (128 * 128)                     # a 32-bit scale for 128 x 128 weights
ROWS_32 = 1 + 4 * (2 * 2048 + 7168) / WEIGHTS    # a 32-bit scale for each output
ROWS_16 = 1 + 2 * (2 * 2048 + 7168) / WEIGHTS
INT4 = 0.5 + 2 / 128                             # a 16-bit scale for 128 weights
INT4_ZERO = 0.5 + 2.5 / 128                      # and a 4-bit zero point


def per_weight(write: Write, fields: dict[str, Any], **files: Any) -> tuple[float, ModelSpec]:
    spec = ModelSpec.from_pretrained(write(MODEL | fields, **files))
    return int(spec.bytes_per_expert_E()[0]) / WEIGHTS, spec


def group(targets: list[str], **weights: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": weights}


GPTQ: dict[str, Any] = dict(quant_method="gptq", bits=4, group_size=128, sym=True, desc_act=False)
FP8_BLOCKS: dict[str, Any] = dict(quant_method="fp8", weight_block_size=[128, 128])
NV = dict(num_bits=4, type="float", group_size=16)
INSIDE: dict[str, tuple[dict[str, Any], float]] = {
    "fp8 in blocks": (FP8_BLOCKS, BLOCKS),
    "fp8, a scale a tensor": (dict(quant_method="fp8", weight_block_size=None), FP8),
    "fbgemm": (dict(quant_method="fbgemm_fp8", modules_to_not_convert=["lm_head"]), ROWS_32),
    "mxfp4": (dict(quant_method="mxfp4"), MXFP4),
    "gptq": (GPTQ, INT4_ZERO),
    "gptq in 8 bits": (GPTQ | dict(bits=8), 1 + 3 / 128),
    "gptq, experts otherwise": (
        GPTQ | dict(dynamic={"-:.*attn.*": {}, "+:.*experts.*": dict(bits=8, group_size=64)}),
        1 + 3 / 64),
    "gptq, attention alone": (
        GPTQ | dict(modules_in_block_to_quantize=[["self_attn.q_proj"]]), PLAIN),
    "gptq, not the experts": (GPTQ | dict(dynamic={"-:.*mlp\\.experts.*": {}}), PLAIN),
    "awq": (dict(quant_method="awq", bits=4, group_size=64, zero_point=True), 0.5 + 2.5 / 64),
    "awq, not the experts": (
        dict(quant_method="awq", bits=4, group_size=64, modules_to_not_convert=["experts"]), PLAIN),
    "awq, not the router": (
        dict(quant_method="awq", bits=4, group_size=128, modules_to_not_convert=["gate"]),
        INT4_ZERO),
    "auto-round": (dict(quant_method="auto-round", bits=4, group_size=128), INT4_ZERO),
    "auto-round, mx": (
        dict(quant_method="auto-round", bits=4, group_size=32, data_type="mx_fp"), MXFP4),
    "auto-round, experts otherwise": (
        dict(quant_method="auto-round", bits=4, group_size=128,
             extra_config={".*experts.*": dict(bits=8, group_size=128)}), 1 + 3 / 128),
    "bitsandbytes": (
        dict(quant_method="bitsandbytes", load_in_4bit=True), 0.5 + 4 / 64),
    "bitsandbytes, twice": (
        dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_use_double_quant=True),
        0.5 + (8 + 32 / 256) / 8 / 64),
    "hqq": (dict(quant_method="hqq", quant_config=dict(
        weight_quant_params=dict(nbits=4, group_size=64))), 0.5 + 2.5 / 64),
    "torchao": (dict(quant_method="torchao", quant_type="float8_weight_only"), FP8),
    "torchao by class": (dict(quant_method="torchao", quant_type=dict(default=dict(
        _type="Int4WeightOnlyConfig", _data=dict(group_size=128)))), INT4),
    "quark": (dict(quant_method="quark", global_quant_config=dict(
        weight=dict(dtype="fp4", qscheme="per_group", group_size=32)), exclude=["lm_head"]), MXFP4),
    "quark, mx": (dict(quant_method="quark", global_quant_config=dict(weight=dict(
        dtype="mx", mx_element_dtype="fp4", qscheme="per_group", group_size=32))), MXFP4),
    "quark, two stages": (dict(quant_method="quark", global_quant_config=dict(weight=[
        dict(dtype="fp8_e4m3", qscheme="per_tensor"),
        dict(dtype="int4", qscheme="per_group", group_size=128)])), INT4),
    "quark, a tensor": (dict(quant_method="quark", global_quant_config=dict(
        weight=dict(dtype="fp8_e4m3", qscheme="per_tensor"))), FP8),
    "quark, experts otherwise": (dict(
        quant_method="quark",
        global_quant_config=dict(weight=dict(dtype="fp8_e4m3", qscheme="per_tensor")),
        layer_quant_config={"*.mlp.experts.*": dict(
            weight=dict(dtype="fp4", qscheme="per_group", group_size=32))}), MXFP4),
    "quark, not the experts": (dict(
        quant_method="quark", exclude=["re:.*experts.*"],
        global_quant_config=dict(weight=dict(dtype="fp8_e4m3", qscheme="per_tensor"))), PLAIN),
    "groups, nvfp4": (dict(quant_method="modelopt", config_groups=dict(
        group_0=group(["Linear"], **NV))), NVFP4),
    "groups, whole numbers": (dict(quant_method="compressed-tensors", config_groups=dict(
        group_0=group(["Linear"], num_bits=4, type="int", strategy="group", group_size=32,
                      symmetric=True))), 0.5 + 2 / 32),
    "groups, with zero points": (dict(quant_method="compressed-tensors", config_groups=dict(
        group_0=group(["Linear"], num_bits=4, type="int", strategy="group", group_size=128,
                      symmetric=False))), INT4_ZERO),
    "groups, mxfp4": (dict(quant_method="compressed-tensors", format="mxfp4-pack-quantized",
                           config_groups=dict(group_0=group(
                               ["Linear"], num_bits=4, type="float", group_size=32,
                               scale_dtype="torch.uint8"))), MXFP4),
    "groups, rows of fp8": (dict(quant_method="compressed-tensors", config_groups=dict(
        group_0=group(["Linear"], num_bits=8, type="float", strategy="channel"))), ROWS_16),
    "groups, the experts' own": (dict(quant_method="compressed-tensors", config_groups=dict(
        group_0=group(["Linear"], num_bits=8, type="float"),
        group_1=group(["re:.*mlp\\.experts\\..*"], **NV))), NVFP4),
    "groups, others' only": (dict(quant_method="compressed-tensors", config_groups=dict(
        group_0=group(["re:.*self_attn.*"], num_bits=8, type="float"))), PLAIN),
    "groups, activations only": (dict(quant_method="compressed-tensors", config_groups=dict(
        group_0=dict(targets=["Linear"], weights=None))), PLAIN),
    "groups, the way out in 8 bits": (dict(quant_method="compressed-tensors", config_groups=dict(
        group_0=group(["re:.*down_proj"], num_bits=8, type="float"),
        group_1=group(["Linear"], **NV))), (2 * NVFP4 + FP8) / 3),
    "taken back by a regular expression": (dict(
        quant_method="compressed-tensors", ignore=["lm_head", "re:.*mlp.experts.*"],
        config_groups=dict(group_0=group(["Linear"], **NV))), PLAIN),
    "taken back for others only": (dict(
        quant_method="compressed-tensors", config_groups=dict(group_0=group(["Linear"], **NV)),
        ignore=["lm_head", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*", "mtp*"]),
        NVFP4),
    "taken back by a glob": (
        dict(quant_algo="FP8", exclude_modules=["*mlp.experts*", "lm_head"]), PLAIN),
    "an algorithm's name": (dict(quant_method="modelopt", quant_algo="NVFP4"), NVFP4),
    "int4 for fp8 activations": (dict(quant_algo="W4A8_AWQ", group_size=128), INT4),
    "mxfp8": (dict(quant_algo="MXFP8"), MXFP8),
    "fp8 blocks by name": (dict(quant_algo="FP8_PB_WO"), BLOCKS),
    "mixed, by module": (dict(
        quant_method="modelopt", quant_algo="MIXED_PRECISION", quantized_layers={
            "model.layers.3.self_attn.o_proj": dict(quant_algo="FP8"),
            **{f"model.layers.{i}.mlp.experts": dict(quant_algo="W4A16_NVFP4", group_size=16)
               for i in range(3, 61)}}), NVFP4),
    "mixed, expert by expert": (dict(quant_algo="MIXED_PRECISION", quantized_layers={
        f"model.layers.{i}.mlp.experts.{e}.{m}_proj": dict(quant_algo="MXFP8")
        for i in range(3, 61) for e in range(4) for m in ("gate", "up", "down")}), MXFP8),
    "experts' own algorithm": (FP8_BLOCKS | dict(moe_quant_algo="NVFP4", group_size=16), NVFP4),
    "experts' own dtype inside": (FP8_BLOCKS | dict(expert_dtype="fp4"), MXFP4),
    "the cache only": (dict(kv_cache_quant_algo="FP8", quant_algo=None), PLAIN),
}


@pytest.mark.parametrize("said", INSIDE)
def test_inside_the_configuration(write: Write, said: str) -> None:
    document, wanted = INSIDE[said]
    found, spec = per_weight(write, {"quantization_config": document})
    assert found == pytest.approx(wanted, abs=1e-7) and spec.notes == ()


@pytest.mark.parametrize(("fields", "wanted"), [
    ({"expert_dtype": "fp4", "quantization_config": FP8_BLOCKS}, MXFP4),
    ({"expert_dtype": "fp8", "quantization_config": FP8_BLOCKS}, BLOCKS),
    ({"expert_dtype": "bfloat16", "quantization_config": FP8_BLOCKS}, PLAIN),
    ({"use_fp8_experts": True}, FP8), ({"use_fp8_experts": False}, PLAIN),
    ({"quantize": "w8a8_dynamic"}, ROWS_16), ({"quantize": "w4a8_dynamic"}, INT4),
    ({"quantization": {"quant_algo": "FP8"}}, FP8),
    ({"quantization_config": None}, PLAIN), ({"torch_dtype": "float32"}, 4.0),
    ({"torch_dtype": "torch.float16"}, PLAIN), ({"torch_dtype": "float8_e4m3fn"}, FP8),
])
def test_under_a_key_of_its_own(write: Write, fields: dict[str, Any], wanted: float) -> None:
    found, spec = per_weight(write, fields)
    assert found == pytest.approx(wanted, abs=1e-7) and spec.notes == ()


@pytest.mark.parametrize(("name", "content", "wanted"), [
    ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, NVFP4),
    ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, FP8),
    ("hf_quant_config.json", {"quantization": {"quant_algo": None}}, PLAIN),
    ("hf_quant_config.json", {"quantization": {
        "quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.*.mlp.experts*"]}},
     PLAIN),
    ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, INT4_ZERO),
    ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, INT4_ZERO),
    ("quant_model_description.json", {
        "model.layers.0.mlp.gate_proj.weight": "FLOAT",
        "model.layers.3.mlp.experts.0.gate_proj.weight": "W8A8_DYNAMIC"}, ROWS_16),
])
def test_in_the_quantisers_own_file_beside_it(
    write: Write, name: str, content: dict[str, Any], wanted: float
) -> None:
    found, spec = per_weight(write, {}, beside={name: content})
    assert found == pytest.approx(wanted, abs=1e-7) and spec.notes == ()


def test_where_configuration_and_file_disagree_the_first_counts_and_a_note_says_so(
    write: Write,
) -> None:
    beside = {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}
    found, spec = per_weight(write, {"quantization_config": FP8_BLOCKS}, beside=beside)
    assert found == pytest.approx(BLOCKS)
    assert spec.notes == (
        "bytes per expert: quantization_config says fp8, hf_quant_config.json nvfp4; the first is "
        "taken",
    )


def test_layers_that_keep_another_format_are_counted_in_a_note(write: Write) -> None:
    """Most layers decide; the exceptions are said beside the figure."""
    document = dict(quant_method="compressed-tensors", ignore=["re:.*layers\\.(3|4|60)\\..*"],
                    config_groups=dict(group_0=group(["Linear"], **NV)))
    found, spec = per_weight(write, {"quantization_config": document})
    assert found == pytest.approx(NVFP4)
    assert spec.notes == (
        "bytes per expert: 3 of 58 layers keep their experts in bf16; nvfp4, that of 55, is taken "
        "for all",
    )


def test_a_format_said_of_some_layers_counts_for_all_with_a_note(write: Write) -> None:
    document = dict(quant_algo="MIXED_PRECISION", quantized_layers={
        "model.layers.5.mlp.experts": dict(quant_algo="NVFP4")})
    found, spec = per_weight(write, {"quantization_config": document})
    assert found == pytest.approx(NVFP4)
    assert len(spec.notes) == 1 and "of layers 5 only" in spec.notes[0]


@pytest.mark.parametrize("document", [
    {"quant_method": "magic"}, {"quant_algo": "HADAMARD3"}, {"quant_method": "gptq"},
    {"quant_method": "aqlm"}, {"quantized_layers": {"model.layers.3.mlp.experts": "RIDDLE"}},
])
def test_what_is_not_known_is_a_note_and_no_bytes(write: Write, document: dict[str, Any]) -> None:
    spec = ModelSpec.from_pretrained(write(MODEL | {"quantization_config": document}))
    assert spec.num_layers == 58 and not spec.knows_sizes and not spec.knows_bytes
    assert len(spec.notes) == 1 and spec.notes[0].startswith("bytes per expert: unknown")


@pytest.mark.parametrize("document", [
    {"config_groups": {"g": None}}, {"config_groups": {"g": {"weights": {"type": "int"}}}},
    {"quant_method": "fp8", "weight_block_size": [0, 0]}, {"ignore": 3, "quant_method": "fp8"},
    {"quant_method": "fp8", "weight_block_size": "big"},
    {"quant_method": "gptq", "bits": "four", "group_size": 128},
])
def test_what_cannot_be_read_is_one_line(write: Write, document: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json: .*cannot be read") as caught:
        ModelSpec.from_pretrained(write(MODEL | {"quantization_config": document}))
    assert "\n" not in str(caught.value)


def test_experts_beside_a_dense_block_are_told_from_it(write: Write) -> None:
    """Gemma 4 has a dense `mlp` in each layer beside its `experts`: leaving one is not both."""
    fields = dict(model_type="gemma4", text_config=dict(
        model_type="gemma4_text", hidden_size=2816, moe_intermediate_size=704, num_experts=128,
        top_k_experts=8, num_hidden_layers=30, dtype="bfloat16"),
        quantization_config=dict(
            config_groups=dict(group_0=group(["Linear"], **NV)),
            ignore=["lm_head", *(f"model.language_model.layers.{i}.mlp*" for i in range(30))]))
    spec = ModelSpec.from_pretrained(write(fields))
    assert spec.bytes_per_expert_E()[0] == 3 * 2816 * 704 * 9 // 16
