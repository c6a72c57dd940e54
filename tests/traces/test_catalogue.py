"""Published models by name: as written, found under the names people type, never a wrong one."""

from __future__ import annotations

import pytest

from loadmaster.errors import InputError
from loadmaster.foundation.documents import read_yaml
from loadmaster.traces.catalogue import CATALOGUE, catalogue_model, models_of_shape


def test_gpt_oss_20b_as_published() -> None:
    """24 layers of 32 experts, top-4; mxfp4 with its scales, biases in 16 bits."""
    spec = catalogue_model("gpt-oss-20b")
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (24, 32, 4)
    weights = 3 * 2880 * 2880
    assert spec.bytes_per_expert_E()[0] == weights // 2 + weights // 32 + 2 * (3 * 2880)
    assert spec.knows_sizes and spec.notes == ()


def test_deepseek_v3_as_published() -> None:
    """58 of 61 layers, groups, one shared expert, fp8 with a scale per 128 x 128, one MTP layer."""
    spec = catalogue_model("deepseek-ai/DeepSeek-V3-0324")
    assert spec.layer_indices == tuple(range(3, 61)) and spec.total_layers == 61
    assert (spec.num_expert_groups, spec.groups_per_token, spec.num_shared_experts) == (8, 4, 1)
    assert spec.bytes_per_expert_E()[0] == 3 * 7168 * 2048 + 3 * 4 * (7168 // 128) * (2048 // 128)
    assert spec.draft_layers is not None and spec.draft_layers.layer_indices == (61,)


@pytest.mark.parametrize(("typed", "known"), [
    ("openai/GPT-OSS-20B", "gpt-oss-20b"),
    ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3-235b-a22b"),
    ("DeepSeek-R1-0528", "deepseek-v3"),
    ("mixtral_8x7b", "mixtral-8x7b"),
    ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout"),
    ("Kimi-K2-Instruct-0905", "kimi-k2"),
    ("moonshotai/Kimi-K2-Thinking", "kimi-k2-thinking"),
    ("zai-org/GLM-4.5-Air", "glm-4.5-air"),
])
def test_a_release_is_found_under_its_own_name(typed: str, known: str) -> None:
    assert catalogue_model(typed).name == known


def test_a_format_at_the_end_of_the_name_replaces_the_published_one() -> None:
    spec = catalogue_model("nvidia/DeepSeek-R1-NVFP4")
    assert spec.bytes_per_expert_E()[0] == 24_772_608        # 4.5 bits a weight
    assert len(spec.notes) == 1 and spec.notes[0].startswith("bytes per expert: nvfp4")
    assert catalogue_model("Qwen3-30B-A3B-FP8").bytes_per_parameter == 1


@pytest.mark.parametrize(("typed", "close"), [
    ("gpt-oss-21b", "gpt-oss-20b"), ("deepseekv3", "deepseek-v3"), ("qwen3-30b", "qwen3-30b-a3b"),
    ("deepseek-r1-distill-qwen-32b", "deepseek-r1"),      # a dense model is not its teacher
    ("zzz", "gpt-oss-20b"),
])
def test_a_name_that_is_not_there_is_one_line_with_close_ones(typed: str, close: str) -> None:
    with pytest.raises(InputError, match=close) as caught:
        catalogue_model(typed)
    assert "\n" not in str(caught.value) and repr(typed) in str(caught.value)


def test_every_entry_is_a_model_of_its_own_shape() -> None:
    """Each can be made, is found by its shape, and knows its bytes without a note."""
    names = list(read_yaml(CATALOGUE))
    assert len(names) >= 60
    for name in names:
        spec = catalogue_model(name)
        assert spec.name == name and spec.knows_sizes and spec.notes == ()
        assert max(spec.own_layer_indices()) < spec.total_layers
        assert name in models_of_shape(spec.num_layers, spec.num_experts, spec.top_k)


def test_models_of_a_traces_shape() -> None:
    assert models_of_shape(24, 32, 4) == ("gpt-oss-20b",)
    assert models_of_shape(26, 64, 6) == ("deepseek-v2-lite", "moonlight-16b-a3b")
    assert models_of_shape(7, 32, 4) == ()
