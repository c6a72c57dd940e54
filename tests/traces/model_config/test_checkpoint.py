"""ModelSpec from a checkpoint's configuration, against the models transformers really builds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.oracles.built_models import FAMILIES, build
from loadmaster.errors import InputError
from loadmaster.traces.model_spec import ModelSpec


def write(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


DEEPSEEK = dict(
    model_type="deepseek_v3", hidden_size=7168, moe_intermediate_size=2048, num_hidden_layers=61,
    n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1, n_group=8, topk_group=4,
    first_k_dense_replace=3, torch_dtype="bfloat16", intermediate_size=18432,
    quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
)


def test_deepseek_v3_as_published(tmp_path: Path) -> None:
    """58 of 61 layers, 8 groups of which 4, one shared expert, fp8 with a scale per 128 x 128."""
    spec = ModelSpec.from_pretrained(write(tmp_path, **DEEPSEEK))
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (58, 256, 8)
    assert spec.layer_indices == tuple(range(3, 61)) and spec.total_layers == 61
    assert (spec.num_expert_groups, spec.groups_per_token, spec.num_shared_experts) == (8, 4, 1)
    scales = 3 * (7168 // 128) * (2048 // 128) * 4
    assert spec.bytes_per_expert_E()[0] == 3 * 7168 * 2048 + scales
    assert spec.activation_bytes == 2 and spec.flops_per_assignment == 6 * 7168 * 2048


def test_a_model_keeps_the_fingerprint_that_plans_were_made_for(tmp_path: Path) -> None:
    """Neither notes nor draft layers count; what was read before there were any is the same."""
    before = ModelSpec.from_pretrained(write(tmp_path, **DEEPSEEK))
    drafts = ModelSpec.from_pretrained(write(tmp_path, **DEEPSEEK, num_nextn_predict_layers=1))
    assert before.digest() == drafts.digest() == "efb8850ab16bbdf2"


def test_gpt_oss_as_published(tmp_path: Path) -> None:
    """Every layer, mxfp4: 4 bits and a byte of scale per 32 weights, biases in 16 bits."""
    spec = ModelSpec.from_pretrained(write(
        tmp_path, model_type="gpt_oss", hidden_size=2880, intermediate_size=2880,
        num_hidden_layers=24, num_local_experts=32, num_experts_per_tok=4,
        quantization_config={"quant_method": "mxfp4"},
    ))
    assert spec.num_layers == 24 and spec.top_k == 4
    weights = 3 * 2880 * 2880
    assert spec.bytes_per_expert_E()[0] == weights // 2 + weights // 32 + 2 * (2 * 2880 + 2880)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (dict(model_type="qwen3_moe", decoder_sparse_step=2), (1, 3, 5, 7)),
        (dict(model_type="qwen2_moe", mlp_only_layers=[0, 5]), (1, 2, 3, 4, 6, 7)),
        (dict(model_type="qwen3_next", decoder_sparse_step=1), tuple(range(8))),
        (dict(model_type="deepseek_v2", first_k_dense_replace=1), tuple(range(1, 8))),
        (dict(model_type="deepseek", first_k_dense_replace=1, moe_layer_freq=2), (2, 4, 6)),
        (dict(model_type="glm4_moe"), tuple(range(1, 8))),
        (dict(model_type="jamba", expert_layer_period=2, expert_layer_offset=1), (1, 3, 5, 7)),
        (dict(model_type="ernie4_5_moe", moe_layer_start_index=2, moe_layer_end_index=6,
              moe_layer_interval=2), (3, 5)),
        (dict(model_type="llama4", text_config=dict(
            model_type="llama4_text", interleave_moe_layer_step=2)), (1, 3, 5, 7)),
        (dict(model_type="llama4", text_config=dict(
            model_type="llama4_text", moe_layers=[2, 3])), (2, 3)),
        (dict(model_type="lfm2_moe", num_dense_layers=3), (3, 4, 5, 6, 7)),
        (dict(model_type="mimo_v2_flash", moe_layer_freq=[0, 1, 1, 0, 1, 1, 1, 1]),
         (1, 2, 4, 5, 6, 7)),
        (dict(model_type="hy_v3", mlp_layer_types=["dense", "sparse"] * 4), (1, 3, 5, 7)),
        (dict(model_type="nemotron_h", hybrid_override_pattern="ME*-ME-E"), (1, 5, 7)),
        (dict(model_type="mixtral"), tuple(range(8))),
    ],
)
def test_dense_layers_are_left_out_by_each_architectures_rule(
    tmp_path: Path, config: dict[str, Any], layers: Any
) -> None:
    sizes = dict(num_hidden_layers=8, num_experts=16, num_experts_per_tok=2, hidden_size=32,
                 intermediate_size=64)
    spec = ModelSpec.from_pretrained(write(tmp_path, **sizes, **config))
    assert spec.layer_indices == layers and spec.num_layers == len(layers)


@pytest.mark.parametrize(
    ("config", "bytes_per_parameter"),
    [
        (dict(dtype="float32"), 4.0),
        (dict(torch_dtype="float16"), 2.0),
        ({}, 2.0),
        (dict(quantization_config=dict(quant_method="awq", bits=4, group_size=128)),
         0.5 + (2 + 0.5) / 128),
        # a 32-bit scale for each 64 weights
        (dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)),
         0.5 + 4 / 64),
        (dict(quantization_config=dict(
            quant_method="compressed-tensors",
            config_groups={"group_0": {"weights": {"num_bits": 8}}})), 1.0),
    ],
)
def test_bytes_of_a_weight_follow_the_dtype_or_the_quantisation(
    tmp_path: Path, config: dict[str, Any], bytes_per_parameter: float
) -> None:
    sizes = dict(model_type="mixtral", num_hidden_layers=2, num_local_experts=4, hidden_size=32,
                 num_experts_per_tok=2, intermediate_size=64)
    spec = ModelSpec.from_pretrained(write(tmp_path, **sizes, **config))
    assert spec.bytes_per_parameter == pytest.approx(bytes_per_parameter)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(model_type="llama", hidden_size=64), r"'llama' is not a mixture.*num_local_experts"),
        (dict(model_type="hunyuan_v1_moe", num_experts=1), "not a mixture"),
        (dict(model_type="brandnew", num_experts=64, num_experts_per_tok=6, num_hidden_layers=9),
         r"'brandnew' is not known.*64 experts, top-k 6, 9 layers.*moe_layers.*ModelSpec\("),
        (dict(model_type="mixtral", num_local_experts=8, num_hidden_layers=2),
         "num_experts_per_tok.*is set"),
        (dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=9,
              num_hidden_layers=2), "top_k 9 is larger than num_experts 8"),
        (dict(model_type="deepseek_v3", n_routed_experts=8, num_experts_per_tok=2,
              num_hidden_layers=3), "no layer is MoE"),
    ],
)
def test_what_cannot_be_read_says_what_was_looked_for(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ModelSpec.from_pretrained(write(tmp_path, **config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"moe_layer_freq": 0}, {"moe_layer_freq": "2"}, {"first_k_dense_replace": "3"},
    {"num_hidden_layers": 10**12}, {"quantization_config": {"config_groups": {"g": None}}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}},
    {"hidden_size": 10**12}, {"num_experts_per_tok": 999},
])
def test_fields_that_cannot_be_read_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    """Zero steps, text for numbers, sizes no memory holds."""
    with pytest.raises(InputError, match=r"config\.json: .*ModelSpec\(|at most") as caught:
        ModelSpec.from_pretrained(write(tmp_path, **(DEEPSEEK | change)))
    assert "\n" not in str(caught.value) and "()" not in str(caught.value).split("ModelSpec")[0]


def test_a_quantisation_that_is_not_known_leaves_the_bytes_unknown_and_says_so(
    tmp_path: Path,
) -> None:
    """Shape and layers stand; there are no bytes, no times, and one note at that figure."""
    spec = ModelSpec.from_pretrained(
        write(tmp_path, **(DEEPSEEK | {"quantization_config": {"quant_method": "magic"}}))
    )
    assert (spec.num_layers, spec.hidden, spec.intermediate) == (58, 7168, 2048)
    assert not spec.weights_known and not spec.knows_sizes and not spec.knows_bytes
    assert len(spec.notes) == 1
    assert spec.notes[0].startswith("bytes per expert: unknown, for quant_method 'magic'")
    assert "bytes_per_parameter" in spec.notes[0] and spec.notes[0] in spec.unsized


def test_a_configuration_nested_too_deep_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 50_000)
    with pytest.raises(InputError, match="not JSON"):
        ModelSpec.from_pretrained(tmp_path)


JUNK: list[Any] = [
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "x", "3", "re:(", "[1]*3", "3,4",
    [], [0], [1, 2], ["re:["], [None], [[1]], [True] * 61, {}, {"a": 1}, {"weights": None},
]
FIELDS = [
    *DEEPSEEK, "moe_layer_freq", "mlp_layer_types", "moe_layers", "expert_dtype", "quantize", "moe",
    "num_nextn_predict_layers", "mtp_config", "text_config", "architectures", "moe_layer_offset",
    "expert_layer_period", "layers_block_type", "zero_expert_num", "num_layers", "mlp_only_layers",
]
QUANTISERS = [
    "quant_method", "quant_algo", "weight_block_size", "config_groups", "quantized_layers", "bits",
    "ignore", "dynamic", "extra_config", "global_quant_config", "group_size", "exclude_modules",
]


@given(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(JUNK), max_size=3),
       st.dictionaries(st.sampled_from(QUANTISERS), st.sampled_from(JUNK), max_size=3))
@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_field_it_is_read_or_refused_in_one_line(
    tmp_path: Path, fields: dict[str, Any], inside: dict[str, Any]
) -> None:
    quantised = {"quantization_config": {"quant_method": "fp8"} | inside} if inside else {}
    write(tmp_path, **(DEEPSEEK | quantised | fields))
    try:
        ModelSpec.from_pretrained(tmp_path).bytes_per_expert_E()
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith(str(tmp_path))


@pytest.mark.parametrize("change", [
    {"layer_indices": (1, 1)}, {"layer_indices": (-1, 0)}, {"expert_bytes": (0, 1, 1, 1)},
    {"bytes_per_parameter": float("inf")}, {"bytes_per_parameter": 1e300}, {"hidden": 10**12},
    {"other_time_us": float("nan")},
])
def test_a_model_of_impossible_numbers_cannot_be_made(change: dict[str, Any]) -> None:
    sound: dict[str, Any] = dict(num_layers=2, num_experts=4, top_k=1, hidden=8, intermediate=8)
    ModelSpec(**sound)
    with pytest.raises(ValueError, match=next(iter(change))):
        ModelSpec(**(sound | change))


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Hugging Face checkpoint"):
        ModelSpec.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        ModelSpec.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        ModelSpec.from_pretrained(tmp_path)


def test_reading_a_configuration_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """It stays as cheap as reading a file."""
    write(tmp_path, **DEEPSEEK)
    script = (
        "import sys; from loadmaster.traces.model_spec import ModelSpec; "
        f"ModelSpec.from_pretrained({str(tmp_path)!r}); "
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_known_family_is_what_transformers_builds(tmp_path: Path, family: str) -> None:
    """Each architecture at its default size, without memory: which layers hold experts, how many,
    and how many parameters one has."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    built = build(family, tmp_path)
    if built is None:
        pytest.skip(f"this transformers has no {family}")
    spec = ModelSpec.from_pretrained(tmp_path)
    assert spec.own_layer_indices() == built.layers and spec.num_experts == built.experts
    assert spec.bytes_per_parameter == 2 and spec.bytes_per_expert_E()[0] == built.bytes
