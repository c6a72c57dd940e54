"""Which patterns of quantisers name a layer's routed experts, and which only look like it."""

from __future__ import annotations

import pytest

from loadmaster.traces.model_config.families import BLOCKS
from loadmaster.traces.model_config.quantisation.module_names import Matrix, layer_of, names_matrix

GATE, UP, DOWN = (Matrix(10, which, 0, BLOCKS) for which in range(3))


@pytest.mark.parametrize("pattern", [
    "Linear", "FusedMoE", "Qwen3MoeExperts", "DeepseekV3MoE",
    "experts", "mlp.experts", "block_sparse_moe", "mlp",
    "model.layers.10", "model.layers.10.mlp", "model.layers.10.mlp.experts",
    "language_model.model.layers.10.feed_forward.experts", "layers.10.ffn.experts",
    "model.layers.10.mlp.experts.0", "model.layers.10.mlp.experts.0.gate_proj",
    "backbone.layers.10.mixer.experts.0.gate_proj", "model.layers.10.block_sparse_moe.experts.0.w1",
    "model.layers.10*", "model.layers.1*", "model.layers.10.*", "*mlp.experts*", "*.experts.*",
    "model.layers.*.mlp", "model.language_model.layers.10.mlp.experts*",
    "re:.*experts.*", "re:.*mlp.*", "re:model\\.layers\\.(9|10)\\..*", "re:.*gate_proj$",
    ".*experts.*", "model\\.layers\\.\\d+\\.mlp\\.experts",
])
def test_it_names_them(pattern: str) -> None:
    assert names_matrix(pattern, GATE)


@pytest.mark.parametrize("pattern", [
    "lm_head", "gate", "mlp.gate", "self_attn", "shared_experts", "LlamaAttention", "head", "",
    "Qwen3MoeAttention", "model.layers.10.mlp.gate", "model.layers.1", "model.layers.1.mlp.experts",
    "model.layers.10.mlp.shared_experts", "model.layers.10.self_attn",
    "model.layers.10.mlp.experts.1", "model.layers.10.mlp.experts.0.down_proj",
    "model.layers.1.*", "model.layers.0*", "*.attn.*", "*.mlp.shared_expert.*", "mtp*",
    "model.layers.10.self_attn*", "model.layers.10.mlp.shared_experts*", "vision_tower*",
    "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    "re:.*gate$", "re:.*mlp.gate$", "re:.*lm_head.*", "re:model\\.layers\\.(1|2)\\..*", "re:(",
    "mtp.layers.0", "mtp.layers.10.mlp.experts", "vision_tower.layers.10.mlp.experts",
    "talker.model.layers.10.mlp.experts",
])
def test_it_only_looks_like_it(pattern: str) -> None:
    assert not names_matrix(pattern, GATE)


def test_a_matrix_is_told_from_the_others() -> None:
    for pattern in ("re:.*down_proj", "*.down_proj", "model.layers.10.mlp.experts.0.w2"):
        named = [names_matrix(pattern, matrix) for matrix in (GATE, UP, DOWN)]
        assert named == [False, False, True]
    assert names_matrix("*.gate_up_proj", GATE) and names_matrix("*.gate_up_proj", UP)


@pytest.mark.parametrize("pattern", [
    "mtp*", "mtp", "mtp.layers.0*", "mtp.0.*", "mtp.layers.0.mlp.experts", "model.layers.61*",
    "model.layers.61.mlp", "re:.*mtp.*", "re:.*layers.61.*",
])
def test_a_draft_layer_goes_by_two_names(pattern: str) -> None:
    assert names_matrix(pattern, Matrix(61, 0, 0, BLOCKS, draft=True))
    assert not names_matrix(pattern, GATE)


@pytest.mark.parametrize(("pattern", "layer"), [
    ("model.layers.10.mlp.experts", 10), ("model.layers.10.self_attn*", 10),
    ("backbone.layers.7.mixer.experts.3.up_proj", 7), ("model.layers.3", 3),
    ("model.layers.1*", None), ("*.experts.*", None), ("lm_head", None),
    ("re:.*layers.3.*", None), ("model.layers.*.mlp", None),
])
def test_the_one_layer_that_a_pattern_is_about(pattern: str, layer: int | None) -> None:
    assert layer_of(pattern) == layer
