"""Weights beside routed experts: from headers exactly, from widths nearly.

Published totals stand beside the estimates: parameters of the whole model less its routed experts.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loadmaster.errors import InputError
from loadmaster.traces.model_config.dense_weights import ModelShape, estimated_dense_bytes
from loadmaster.traces.model_config.on_disk import dense_bytes
from loadmaster.traces.model_spec import ModelSpec

DEEPSEEK_V3 = ModelShape(7168, 61, 58, 256, 2048, shared_experts=1, weight_bytes=1.0)
DEEPSEEK_V3_CONFIG = {
    "hidden_size": 7168, "num_attention_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "intermediate_size": 18432, "vocab_size": 129280,
}


@pytest.mark.parametrize(("shape", "config", "gigabytes"), [
    # 671.0e9 parameters, 653.9e9 of them in routed experts; 1.85e9 in embeddings of 16 bits.
    (DEEPSEEK_V3, DEEPSEEK_V3_CONFIG, 671.0 - 653.9 + 1.85),
    # 46.70e9 parameters, 45.10e9 in experts, 16 bits.
    (ModelShape(4096, 32, 32, 8, 14336),
     {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
      "vocab_size": 32000}, 2 * (46.70 - 45.10)),
    # 13.76e9 bytes on disk, 24 · 32 · 13.2e6 + biases of it in experts.
    (ModelShape(2880, 24, 24, 32, 2880, weight_bytes=0.53),
     {"hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
      "vocab_size": 201088}, 13.76 - 10.17),
])
def test_an_estimate_is_near_what_is_published(
    shape: ModelShape, config: dict[str, int], gigabytes: float
) -> None:
    assert estimated_dense_bytes(shape, config) / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_without_a_configuration_it_is_of_that_order() -> None:
    told = estimated_dense_bytes(DEEPSEEK_V3, DEEPSEEK_V3_CONFIG)
    assert 0.7 < estimated_dense_bytes(DEEPSEEK_V3) / told < 1.5


def test_fields_of_the_language_models_part_count() -> None:
    nested = {"hidden_size": 99, "text_config": DEEPSEEK_V3_CONFIG}
    assert estimated_dense_bytes(DEEPSEEK_V3, nested) == (
        estimated_dense_bytes(DEEPSEEK_V3, DEEPSEEK_V3_CONFIG)
    )


def weights(folder: Path, name: str, **tensors: int) -> None:
    """A safetensors file of float16 vectors of these lengths; `__` in a name stands for a dot."""
    save_file(
        {key.replace("__", "."): np.zeros(n, np.float16) for key, n in tensors.items()},
        folder / name,
    )


def test_headers_tell_it_exactly(tmp_path: Path) -> None:
    """Routed experts are left out by name, and layers that only guess tokens ahead."""
    weights(
        tmp_path, "model-1.safetensors", model__embed_tokens__weight=100,
        model__layers__0__mlp__experts__3__up_proj__weight=1000,
        model__layers__0__mlp__experts__gate_up_proj_blocks=1000,
        model__layers__0__block_sparse_moe__input_linear__weight=1000,
    )
    weights(
        tmp_path, "model-2.safetensors", model__layers__0__mlp__shared_experts__up_proj__weight=20,
        model__layers__1__mlp__gate__weight=3, model__layers__2__self_attn__q_proj__weight=5000,
    )
    assert dense_bytes(tmp_path, 2) == 2 * (100 + 20 + 3)
    assert dense_bytes(tmp_path) == 2 * (100 + 20 + 3 + 5000)


def test_no_weights_tell_nothing_and_broken_ones_are_named(tmp_path: Path) -> None:
    assert dense_bytes(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        dense_bytes(tmp_path)


def test_a_checkpoint_says_whether_it_is_an_estimate(tmp_path: Path) -> None:
    config = DEEPSEEK_V3_CONFIG | {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.from_pretrained(tmp_path)
    assert spec.dense_weights() == (estimated_dense_bytes(DEEPSEEK_V3, config), True)
    weights(tmp_path, "model.safetensors", model__norm__weight=7)
    assert ModelSpec.from_pretrained(tmp_path).dense_weights() == (14, False)
    assert ModelSpec.from_pretrained(tmp_path).digest() == spec.digest()


def test_a_shape_without_widths_tells_nothing() -> None:
    assert ModelSpec(num_layers=2, num_experts=4, top_k=1).dense_weights() is None
