"""How many bytes a model's weights should take beside its routed experts, by its widths.

Attention, embeddings, dense layers, shared experts and routers: an estimate, from a configuration
or from the experts' widths alone. Where weights are on disk, `on_disk.dense_bytes` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY = 150_000         # where nobody says; models have 32,000 to 260,000
ATTENTION_SQUARES = 4.0      # attention's weights in hidden², where no heads are known
_NESTED = ("thinker_config", "text_config", "llm_config", "language_config", "attn_config")


@dataclass(frozen=True)
class ModelShape:
    """The numbers an estimate needs. layers: all hidden layers; weight_bytes: of a parameter."""

    hidden: int
    layers: int
    moe_layers: int
    experts: int
    intermediate: int
    shared_experts: int = 0
    matrices: int = 3
    weight_bytes: float = 2.0


def estimated_dense_bytes(shape: ModelShape, config: Mapping[str, Any] | None = None) -> int:
    """What attention, embeddings, dense layers, shared experts and routers should take.

    config: the checkpoint's configuration, for its heads, vocabulary and dense width. Embeddings
    count 16 bits a weight; the rest shape.weight_bytes, or 16 where experts have fewer than 8.
    """
    said = _flat(config or {})
    hidden = _number(said, "hidden_size", "d_model", "n_embd", "dim") or shape.hidden
    dense_layers = max(shape.layers - shape.moe_layers, 0)
    dense_width = _number(said, "intermediate_size", "ffn_hidden_size") or 4 * hidden
    shared_width = _number(said, "shared_expert_intermediate_size") or shape.intermediate
    linear = (
        shape.layers * _attention(said, hidden)
        + dense_layers * 3.0 * hidden * dense_width
        + shape.moe_layers * shape.shared_experts * shape.matrices * hidden * shared_width
        + shape.moe_layers * shape.experts * hidden
    )
    vocabulary = _number(said, "vocab_size") or VOCABULARY
    embeddings = vocabulary * hidden * (1 if said.get("tie_word_embeddings") else 2)
    return round(linear * _linear_bytes(shape.weight_bytes) + embeddings * 2.0)


def _attention(said: Mapping[str, Any], hidden: int) -> float:
    """Weights of one layer's attention."""
    heads = _number(said, "num_attention_heads", "n_heads", "n_head")
    if not heads:
        return ATTENTION_SQUARES * hidden * hidden
    latent = _number(said, "kv_lora_rank")
    if latent:
        rope = _number(said, "qk_rope_head_dim") or 64
        plain = _number(said, "qk_nope_head_dim") or 128
        value, query = _number(said, "v_head_dim") or 128, _number(said, "q_lora_rank")
        asked = heads * (rope + plain)
        queries = hidden * query + query * asked if query else hidden * asked
        return (
            queries + hidden * (latent + rope) + latent * heads * (plain + value)
            + heads * value * hidden
        )
    width = _number(said, "head_dim") or hidden // heads
    keys = _number(said, "num_key_value_heads", "kv_n_heads") or heads
    return hidden * width * (2 * heads + 2 * keys)


def _linear_bytes(weight_bytes: float) -> float:
    """Of a weight outside the experts: below 8 bits experts alone are quantised."""
    return 2.0 if weight_bytes < 1.0 else min(weight_bytes, 2.0)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's own fields, and over them those of the language model's part."""
    fields = dict(config)
    for name in _NESTED:
        inner = config.get(name)
        if isinstance(inner, Mapping):
            fields |= {k: v for k, v in _flat(inner).items() if v is not None}
    return fields


def _number(said: Mapping[str, Any], *names: str) -> int | None:
    """The first of the fields that holds a whole number above 0."""
    for name in names:
        value = said.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
