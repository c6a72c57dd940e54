"""How many bytes a model's weights take beside its routed experts: read off the files, or reckoned.

Attention, embeddings, dense layers, shared experts and routers. Safetensors headers say it exactly,
expert by expert's name; without weights a configuration's widths give an estimate, and without that
the widths of the experts alone. Knows names, shapes and formats. Reads headers, never weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 150_000         # where nobody says; models have 32,000 to 260,000
ATTENTION_SQUARES = 4.0      # attention's weights in hidden², where no heads are known
_LARGEST_HEADER = 100 << 20  # of a safetensors file, as its own library allows
_NESTED = ("thinker_config", "text_config", "llm_config", "language_config", "attn_config")
_ROUTED = re.compile(r"(^|\.)experts(\.|$)|\.(input|output)_linear\.weight$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


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


def dense_bytes_on_disk(folder: Path, layers: int | None = None) -> int | None:
    """Bytes of the tensors in a checkpoint's safetensors files that are not routed experts.

    layers: the model's hidden layers; those beyond guess tokens ahead (MTP) and do not count. None
    where there are no weights, not all of them, or their headers cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(named)]
        if not files or not all(file.is_file() for file in files):
            return None
        tensors = [tensor for file in files for tensor in _tensors(file)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return sum(size for name, size in tensors if not _ROUTED.search(name) and _runs(name, layers))


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every tensor that the file's header lists."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= _LARGEST_HEADER:
            raise ValueError("no safetensors header")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, last - first


def _runs(name: str, layers: int | None) -> bool:
    """Whether the tensor is of a layer that every step runs, or of none."""
    found = _LAYER.search(name)
    guesses = found is not None and layers is not None and int(found.group(1)) >= layers
    return not guesses and not name.startswith(("mtp.", "model.mtp."))


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
