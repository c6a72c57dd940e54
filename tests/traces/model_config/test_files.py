"""What people name: a folder, a configuration under any name, Mistral's params.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadmaster.errors import InputError
from loadmaster.traces.model_spec import ModelSpec

from .conftest import Write

PARAMS: dict[str, Any] = dict(
    dim=7168, n_layers=61, hidden_dim=16384, moe=dict(
        expert_hidden_dim=4096, first_k_dense_replace=3, num_experts=128, num_experts_per_tok=4,
        num_shared_experts=1, num_expert_groups=1, num_expert_groups_per_tok=1, route_every_n=1),
)
MIXTRAL = dict(model_type="mixtral", num_hidden_layers=2, num_local_experts=4, hidden_size=32,
               num_experts_per_tok=2, intermediate_size=64, torch_dtype="bfloat16")


def test_params_json_is_read_where_there_is_no_configuration(write: Write) -> None:
    spec = ModelSpec.from_pretrained(write(PARAMS, file="params.json"))
    assert spec.own_layer_indices() == tuple(range(3, 61)) and spec.total_layers == 61
    assert (spec.num_experts, spec.top_k, spec.hidden, spec.intermediate) == (128, 4, 7168, 4096)
    assert spec.num_shared_experts == 1
    assert spec.notes == ("bytes per expert: no dtype is given, 16 bits a weight are taken",)


@pytest.mark.parametrize(("quantization", "bits"), [
    (dict(qformat_weight="fp8_e4m3", qscheme_act="TENSOR"), 8),
    (dict(quant_method="compressed-tensors", format="nvfp4-pack-quantized", config_groups=dict(
        g=dict(targets=["Linear"], weights=dict(num_bits=4, type="float", group_size=16)))), 4.5),
])
def test_params_json_tells_its_own_quantisation(
    write: Write, quantization: dict[str, Any], bits: float
) -> None:
    spec = ModelSpec.from_pretrained(
        write(PARAMS | {"quantization": quantization}, file="params.json"))
    assert spec.bytes_per_expert_E()[0] == 3 * 7168 * 4096 * bits / 8 and spec.notes == ()


def test_mixtral_as_mistral_wrote_it(write: Write) -> None:
    """No list of layers, no width of an expert: every layer, the model's own width."""
    spec = ModelSpec.from_pretrained(write(
        dict(dim=4096, n_layers=32, hidden_dim=14336, moe=dict(
            num_experts_per_tok=2, num_experts=8)), file="params.json"))
    assert (spec.num_layers, spec.hidden, spec.intermediate) == (32, 4096, 14336)


def test_a_configuration_is_read_under_its_own_name_with_the_file_beside_it(write: Write) -> None:
    beside = {"org--mine_hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}},
              "hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}
    folder = write(MIXTRAL, file="org--mine_config.json", beside=beside)
    spec = ModelSpec.from_pretrained(folder / "org--mine_config.json")
    assert spec.name == "org--mine"
    assert spec.bytes_per_expert_E()[0] == 3 * 32 * 64 * 9 // 16


def test_a_model_is_named_after_its_folder(write: Write) -> None:
    folder = write(MIXTRAL)
    assert ModelSpec.from_pretrained(folder).name == folder.name
    assert ModelSpec.from_pretrained(folder / "config.json").name == folder.name


@pytest.mark.parametrize(("content", "message"), [
    (None, "give the folder of a Hugging Face checkpoint, its config.json or its params.json"),
    ("{", "not JSON"), ("[]", "not a JSON object"), ('{"a":' * 50_000, "not JSON"),
    ("", "not JSON"),
])
def test_what_is_no_configuration_is_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        ModelSpec.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_file_beside_it_that_is_no_json_is_named(write: Write) -> None:
    folder = write(MIXTRAL)
    (folder / "hf_quant_config.json").write_text("{")
    with pytest.raises(InputError, match=r"hf_quant_config\.json: not JSON"):
        ModelSpec.from_pretrained(folder)


def test_infinity_is_let_in_where_architectures_write_it(write: Write) -> None:
    folder = write(MIXTRAL)
    (folder / "config.json").write_text(json.dumps(MIXTRAL | {"limit": [0.0, float("inf")]}))
    assert ModelSpec.from_pretrained(folder).num_layers == 2
