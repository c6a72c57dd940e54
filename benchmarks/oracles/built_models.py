"""Which experts transformers really builds for a configuration, without memory behind them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

# Families of transformers whose default configuration is an MoE model that can be built.
FAMILIES = (
    "afmoe", "aria", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "dots3_note", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint",
    "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "gpt_oss", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v3", "hy_v4", "hy_v4_vl",
    "inkling2", "inkling2_loop", "jamba", "kimi_k25", "kimi_linear", "kolibri1", "laguna",
    "lara_mini", "llama4", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl",
    "mistral4", "mistral_large4", "mixtral", "muse_spark", "nemo_speechlm", "nemotron_h",
    "nemotron_h_omni", "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe",
    "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "sarvam_mla", "sarvam_moe", "solar_open", "zaya",
)


class Built(NamedTuple):
    """What a model holds: its MoE layers, the experts of one, and an expert's bytes in 16 bits."""

    layers: tuple[int, ...]
    experts: int
    bytes: int


def build(family: str, folder: Path) -> Built | None:
    """Save the family's default configuration there and build it; None: transformers has none."""
    import torch
    import transformers

    if family not in transformers.CONFIG_MAPPING:
        return None
    config: Any = transformers.CONFIG_MAPPING[family]()
    config.save_pretrained(folder)
    with torch.device("meta"):
        text = config.get_text_config()
        try:
            model: Any = transformers.AutoModelForCausalLM.from_config(text)
        except ValueError:
            model = transformers.AutoModel.from_config(text)
    modules = {
        int(re.findall(r"layers\.(\d+)\.", name)[-1]): module
        for name, module in model.named_modules()
        if hasattr(module, "_is_expert_parallel") or type(module).__name__ == "Llama4TextExperts"
    }
    layers = tuple(sorted(modules))
    module = modules[layers[0]]
    own = [p for p in module.parameters() if p.shape[0] == module.num_experts]
    return Built(layers, module.num_experts, 2 * sum(p.numel() for p in own) // module.num_experts)
