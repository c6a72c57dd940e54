"""A rank reads its own experts' tensors and no others, whatever the file layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.random_checkpoint import ARCHITECTURES
from loadmaster.errors import InputError
from loadmaster.workers.protocol.settings import served_spec
from loadmaster.workers.rank.model import MoeCheckpoint, fingerprint
from loadmaster.workers.rank.weight_files import TensorFiles

Get = Callable[[str], Path]


def expert_of(module: Any, expert: int) -> dict[str, torch.Tensor]:
    """One expert's tensors cut out of transformers' own stacked parameters."""
    swap = module.is_transposed
    cut = {
        "gate_up": module.gate_up_proj[expert].T if swap else module.gate_up_proj[expert],
        "down": module.down_proj[expert].T if swap else module.down_proj[expert],
    }
    if module.has_bias:
        cut["gate_up_bias"] = module.gate_up_proj_bias[expert]
        cut["down_bias"] = module.down_proj_bias[expert]
    return {name: tensor.detach().contiguous() for name, tensor in cut.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_expert_is_bit_for_bit_the_one_transformers_loads(
    checkpoint: Get, architecture: str
) -> None:
    directory = checkpoint(architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    ours = MoeCheckpoint(directory)
    for layer, name in enumerate(ours.expert_modules):
        module = model.get_submodule(name)
        for expert in range(ours.shape.experts):
            read = ours.read_expert(layer, expert, torch.bfloat16)
            assert fingerprint(read) == fingerprint(expert_of(module, expert))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_dense_parts_are_loaded_and_no_expert_is(checkpoint: Get, architecture: str) -> None:
    directory = checkpoint(architecture)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    ours = MoeCheckpoint(directory)
    model = ours.load_dense(torch.bfloat16)
    wanted = {
        name: tensor
        for name, tensor in reference.state_dict().items()
        if not any(name.startswith(f"{module}.") for module in ours.expert_modules)
    }
    held = model.state_dict()
    assert set(held) == set(wanted)
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)


def test_one_expert_costs_one_experts_reads(
    checkpoint: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole, row = TensorFiles.read, TensorFiles.read_row

    def note_row(files: TensorFiles, key: str, number: int) -> torch.Tensor:
        read.append(f"{key}[{number}]")
        return row(files, key, number)

    monkeypatch.setattr(TensorFiles, "read", lambda f, k: read.append(k) or whole(f, k))
    monkeypatch.setattr(TensorFiles, "read_row", note_row)
    MoeCheckpoint(checkpoint("qwen3_moe")).read_expert(1, 5, torch.bfloat16)
    stem = "model.layers.1.mlp.experts.5"
    assert sorted(read) == [f"{stem}.{m}_proj.weight" for m in ("down", "gate", "up")]
    read.clear()
    MoeCheckpoint(checkpoint("gpt_oss")).read_expert(0, 3, torch.bfloat16)
    stem = "model.layers.0.mlp.experts"
    matrices = ("down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias")
    assert sorted(read) == [f"{stem}.{m}[3]" for m in matrices]


def test_a_stacked_file_holds_the_same_experts_as_one_with_a_tensor_each(
    checkpoint: Get, tmp_path: Path
) -> None:
    directory = checkpoint("qwen3_moe")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    shutil.copy(directory / "config.json", tmp_path)
    apart, stacked = MoeCheckpoint(directory), MoeCheckpoint(tmp_path)
    for expert in (0, 7):
        assert fingerprint(stacked.read_expert(1, expert, torch.bfloat16)) == fingerprint(
            apart.read_expert(1, expert, torch.bfloat16)
        )


def test_a_checkpoint_in_several_files_reads_like_one(checkpoint: Get, tmp_path: Path) -> None:
    directory = checkpoint("olmoe")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, many = MoeCheckpoint(directory), MoeCheckpoint(tmp_path)
    assert fingerprint(one.read_expert(0, 2, torch.bfloat16)) == fingerprint(
        many.read_expert(0, 2, torch.bfloat16)
    )


# ---- what cannot be served -----------------------------------------------------------------


def altered(directory: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other fields in its config."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a mixture of experts"):
        served_spec(tmp_path, "bfloat16")
    with pytest.raises(InputError, match="no mixture-of-experts layers"):
        MoeCheckpoint(tmp_path)


def test_an_architecture_that_cannot_be_built_is_refused(
    checkpoint: Get, tmp_path: Path
) -> None:
    """Its sizes can still be read, from its architecture and its weights; serving it takes code."""
    plain = checkpoint("olmoe")
    directory = altered(plain, tmp_path / "x", model_type="nobody_knows")
    assert served_spec(directory, "bfloat16").digest() == served_spec(plain, "bfloat16").digest()
    with pytest.raises(InputError, match="does not know"):
        MoeCheckpoint(directory)


def test_a_missing_expert_tensor_is_named(checkpoint: Get, tmp_path: Path) -> None:
    directory = altered(checkpoint("olmoe"), tmp_path / "x")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.6.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"expert 6 of model\.layers\.1\.mlp\.experts\.gate_up"):
        MoeCheckpoint(directory)


def test_a_missing_dense_tensor_is_named(checkpoint: Get, tmp_path: Path) -> None:
    directory = altered(checkpoint("olmoe"), tmp_path / "x")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj\.weight is missing"):
        MoeCheckpoint(directory).load_dense(torch.bfloat16)


def test_a_cut_off_file_is_refused(checkpoint: Get, tmp_path: Path) -> None:
    directory = altered(checkpoint("olmoe"), tmp_path / "x")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        MoeCheckpoint(directory)


def test_pickled_weights_are_not_opened(checkpoint: Get, tmp_path: Path) -> None:
    shutil.copy(checkpoint("olmoe") / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(InputError, match="safetensors only"):
        MoeCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/hostname", "gone.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(
    checkpoint: Get, tmp_path: Path, name: str
) -> None:
    directory = altered(checkpoint("olmoe"), tmp_path / "x")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": name}})
    )
    with pytest.raises(InputError, match="incomplete or was tampered with"):
        MoeCheckpoint(directory)


def test_quantised_experts_are_refused(checkpoint: Get, tmp_path: Path) -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    directory = altered(checkpoint("olmoe"), tmp_path / "x", quantization_config=quantised)
    with pytest.raises(InputError, match="quantised"):
        MoeCheckpoint(directory)


@pytest.mark.parametrize(("architecture", "config", "said"), [
    # stacked experts: their own tensors tell
    ("gpt_oss", {"num_local_experts": 16},
     r"experts\.down_proj has shape \[8, .*config.json it is \[16, "),
    ("gpt_oss", {"num_local_experts": 4}, r"has shape \[8, .* it is \[4, "),
    # an expert each: more of them than the config knows
    ("qwen3_moe", {"num_local_experts": 4}, r"gate.weight has shape \[8, 64\].*\[4, 64\]"),
    ("mixtral", {"hidden_size": 32}, r"has shape \[.*64.*\], by config.json it is \[.*32"),
    ("qwen3_moe", {"vocab_size": 128}, r"lm_head.weight has shape \[256, 64\].*\[128, 64\]"),
    ("deepseek_v3", {"kv_lora_rank": 8}, r"kv_.*has shape "),
])
def test_tensors_that_do_not_fit_the_config_are_named_with_shapes_and_file(
    checkpoint: Get, tmp_path: Path, architecture: str, config: dict[str, int], said: str
) -> None:
    directory = altered(checkpoint(architecture), tmp_path / "x", **config)
    with pytest.raises(InputError, match=rf"x/model\.safetensors: .*{said}") as caught:
        MoeCheckpoint(directory)
    assert len(str(caught.value).splitlines()) == 1


def test_experts_whose_parts_do_not_fit_together_are_named(checkpoint: Get, tmp_path: Path) -> None:
    """The config's width of experts is another: nothing but the experts' own tensors tells."""
    directory = altered(checkpoint("qwen3_moe"), tmp_path / "x", moe_intermediate_size=16)
    with pytest.raises(InputError, match=r"model.safetensors: tensors .*gate_proj.weight "
                                         r"\[32, 64\].* do not make the \[32, 64\]"):
        MoeCheckpoint(directory).read_expert(0, 0, torch.bfloat16)
