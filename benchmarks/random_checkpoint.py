"""Random checkpoints of the architectures we are checked against, as large as asked.

Weights are noise: good for parity, memory and timing, not for text. Knows transformers'
configurations. Knows nothing of ranks or plans.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from loadmaster.errors import UsageError

ARCHITECTURES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def random_config(
    architecture: str,
    *,
    layers: int = 2,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 64,
    intermediate: int = 32,
) -> Any:
    """A small configuration of one of `ARCHITECTURES`, over 256 tokens and 2,048 positions."""
    transformers: Any = importlib.import_module("transformers")
    common = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "num_experts_per_tok": top_k,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if architecture == "mixtral":
        return transformers.MixtralConfig(
            **common, intermediate_size=intermediate, num_local_experts=experts
        )
    if architecture == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **common, intermediate_size=2 * hidden, moe_intermediate_size=intermediate,
            num_experts=experts, head_dim=hidden // 4, norm_topk_prob=True,
        )
    if architecture == "olmoe":
        return transformers.OlmoeConfig(
            **common, intermediate_size=intermediate, num_experts=experts
        )
    if architecture == "deepseek_v3":
        return transformers.DeepseekV3Config(
            **(common | {"num_key_value_heads": 4, "num_hidden_layers": layers + 1}),
            intermediate_size=2 * hidden, moe_intermediate_size=intermediate,
            n_routed_experts=experts, n_group=2, topk_group=1, first_k_dense_replace=1,
            q_lora_rank=hidden // 2, kv_lora_rank=hidden // 4, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=16, n_shared_experts=1,
        )
    if architecture == "gpt_oss":
        return transformers.GptOssConfig(
            **common, intermediate_size=intermediate, num_local_experts=experts,
            head_dim=hidden // 4, sliding_window=16,
        )
    raise UsageError(f"no random {architecture!r}; there are: {', '.join(ARCHITECTURES)}")


def save_random_checkpoint(
    architecture: str,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    standard_deviation: float = 0.05,
    **sizes: int,
) -> Path:
    """Write a checkpoint with noise for weights; `sizes` go to `random_config`. Same seed, same
    bytes. Routers get a wider noise, so that experts are chosen unevenly and clearly."""
    transformers: Any = importlib.import_module("transformers")
    config = random_config(architecture, **sizes)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(previous)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            wider = 4.0 if name.endswith(("gate.weight", "router.weight")) else 1.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (standard_deviation * wider))
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    return Path(directory)
