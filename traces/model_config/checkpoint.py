"""A checkpoint's config.json as the fields of a ModelSpec.

A table of field names and one rule per architecture for which layers are MoE. Reads JSON only:
knows nothing of weights, torch or transformers. Rules and names follow the architectures' own
modelling code; tests build every one of them and compare.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...foundation.documents import read_json
from .layer_ranges import MOST_LAYERS

Config = dict[str, Any]
LayerRule = Callable[[Config, int], Iterable[int]]



# The same quantity under the names that architectures give it; the first that is set counts.
FIELDS: dict[str, tuple[str, ...]] = {
    "experts": ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
              "top_k_experts"),
    "layers": ("num_hidden_layers", "n_layers", "num_layers"),
    "hidden": ("moe_latent_size", "moe_hidden_size", "hidden_size", "d_model"),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size",
                     "ffn_hidden_size"),
    "shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
               "num_shared_expert"),
    "shared width": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "groups": ("n_group", "num_expert_group"),
    "groups per token": ("topk_group",),
}
# Where multimodal and nested configurations keep the language model's fields.
_NESTED = ("thinker_config", "text_config", "llm_config", "language_config", "ffn_config")
_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8_e4m3fn": 1.0}


def _every(config: Config, layers: int) -> Iterable[int]:
    return range(layers)


def _after_dense(default: int) -> LayerRule:
    """The first layers are dense, then every one is MoE, or every `moe_layer_freq`-th."""

    def rule(config: Config, layers: int) -> Iterable[int]:
        dense = config.get("first_k_dense_replace", config.get("num_dense_layers"))
        frequency = config.get("moe_layer_freq", 1)
        if isinstance(frequency, list):
            return [i for i, moe in enumerate(frequency) if moe]
        return [i for i in range(default if dense is None else dense, layers) if i % frequency == 0]

    return rule


def _sparse_step(default_dense: tuple[int, ...] = ()) -> LayerRule:
    """Every `decoder_sparse_step`-th layer except those in `mlp_only_layers` (Qwen)."""

    def rule(config: Config, layers: int) -> Iterable[int]:
        dense = config.get("mlp_only_layers")
        step = config.get("decoder_sparse_step") or 1
        dense = default_dense if dense is None else dense
        return [i for i in range(layers) if i not in dense and (i + 1) % step == 0]

    return rule


def _interleaved(config: Config, layers: int) -> Iterable[int]:
    if config.get("moe_layers"):
        return [int(i) for i in config["moe_layers"]]
    step = config.get("interleave_moe_layer_step") or 1
    return range(step - 1, layers, step)


def _periodic(config: Config, layers: int) -> Iterable[int]:
    period, offset = config.get("expert_layer_period", 2), config.get("expert_layer_offset", 1)
    return [i for i in range(layers) if i % period == offset]


def _from_to(config: Config, layers: int) -> Iterable[int]:
    start, end = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
    interval = config.get("moe_layer_interval", 1)
    end = layers - 1 if end in (-1, None) else end
    return [i for i in range(start, end + 1) if (i + 1) % interval == 0]


def _by_block(config: Config, layers: int) -> Iterable[int]:
    return [i for i, block in enumerate(_blocks(config)) if block in ("moe", "E")]


def _blocks(config: Config) -> list[str]:
    """The kind of each layer, as a list or as one letter each (Nemotron-H)."""
    return list(config.get("layers_block_type") or config.get("hybrid_override_pattern") or ())


_RULES: dict[str, LayerRule] = {
    **dict.fromkeys(
        ("aria_text", "dbrx", "flex_olmo", "gemma4_text", "diffusion_gemma_text", "gpt_oss",
         "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
         "hunyuan_v1_moe", "inkling2_text", "kolibri1", "mellum", "minimax", "minimax_m2",
         "minimax_m3_vl_text", "mixtral", "muse_spark_text", "olmoe", "openai_privacy_filter",
         "phimoe", "qwen3_5_moe_text", "qwen4_exp_text", "solar_open", "zaya", "deepseek_v4"),
        _every,
    ),
    **dict.fromkeys(
        ("deepseek", "deepseek_v2", "dots1", "mistral4", "unlimited_ocr_text",
         "deepseek_ocr2_text", "cohere2_moe", "bailing_moe", "bailing_moe_v2"),
        _after_dense(0),
    ),
    **dict.fromkeys(
        ("afmoe", "axk1", "axk2", "dots3_note_text", "ernie4_5_vl_moe_text", "exaone_moe",
         "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "hy_v3", "hy_v4", "kimi_linear",
         "laguna", "mimo_v2_flash", "mistral_large4_text"),
        _after_dense(1),
    ),
    **dict.fromkeys(("lfm2_moe", "bailing_hybrid"), _after_dense(2)),
    **dict.fromkeys(
        ("beam", "deepseek_v3", "deepseek_v32", "glm5_next_text", "glm_moe_dsa", "kimi_k2"),
        _after_dense(3),
    ),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_text", "qwen3_vl_moe_text"),
        _sparse_step(),
    ),
    "flint": _sparse_step((0, 1)),
    "jamba": _periodic,
    "ernie4_5_moe": _from_to,
    "llama4_text": _interleaved,
    "nemotron_h": _by_block,
}
_WITHOUT_GATE = frozenset({"nemotron_h"})
_ALWAYS_ONE_SHARED = frozenset({"llama4_text"})
_WITH_EXPERT_BIASES = frozenset({"gpt_oss", "openai_privacy_filter"})
BY_HAND = (
    "describe the model yourself: ModelSpec(num_layers=…, num_experts=…, top_k=…, hidden=…, "
    "intermediate=…, layer_indices=(…))"
)


def checkpoint_fields(path: Path) -> dict[str, Any]:
    """ModelSpec's fields from a checkpoint's config.json, which it may still refuse.

    Raises InputError; see `ModelSpec.from_pretrained`.
    """
    whole = _read_config(path)
    config = _language_model(whole)
    architecture = str(config.get("model_type", ""))
    experts, top_k = _find(config, "experts"), _find(config, "top_k")
    if not experts or experts < 2:
        raise InputError(
            f"{path}: model_type {architecture!r} is not a mixture of experts: none of "
            f"{', '.join(FIELDS['experts'])} says 2 or more; give an MoE checkpoint, or {BY_HAND}"
        )
    layers = _find(config, "layers") or len(_blocks(config))
    if architecture not in _RULES:
        raise InputError(
            f"{path}: model_type {architecture!r} is not known (it says {experts} experts, top-k "
            f"{top_k}, {layers} layers, but not which of them are MoE); {BY_HAND}"
        )
    if not top_k or not layers:
        missing = "top_k" if not top_k else "layers"
        raise InputError(
            f"{path}: none of {', '.join(FIELDS[missing])} is set; add it, or {BY_HAND}"
        )
    if layers > MOST_LAYERS:
        raise InputError(f"{path}: says {layers} layers, at most {MOST_LAYERS} can be")
    try:
        return _fields(path, whole, config, architecture, (layers, experts, top_k))
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{path}: which layers are MoE, or how weights are quantised, is written in a way that "
            f"cannot be read ({error}); correct it, or {BY_HAND}"
        ) from error


def _fields(
    path: Path, whole: Config, config: Config, architecture: str, shape_LEK: tuple[int, int, int]
) -> dict[str, Any]:
    layers, experts, top_k = shape_LEK
    indices = _moe_layers(config, architecture, layers)
    if not indices:
        raise InputError(f"{path}: no layer is MoE by its own fields; {BY_HAND}")
    hidden, width = _find(config, "hidden"), _find(config, "intermediate")
    matrices = 2 if architecture in _WITHOUT_GATE else 3
    weight_bytes, scale_bytes = _weight_bytes(path, whole, config, (hidden, width, matrices))
    if architecture in _WITH_EXPERT_BIASES and hidden and width:
        scale_bytes += 2 * ((matrices - 1) * width + hidden)  # kept in 16 bits
    groups = _find(config, "groups") or 1
    return dict(
        name=path.parent.resolve().name, num_layers=len(indices), num_experts=experts,
        top_k=top_k, hidden=hidden, intermediate=width, matrices_per_expert=matrices,
        bytes_per_parameter=weight_bytes, scale_bytes_per_expert=scale_bytes,
        activation_bytes=min(4.0, max(2.0, _dtype_bytes(whole, config))),
        num_shared_experts=_shared_experts(config, architecture), num_expert_groups=groups,
        groups_per_token=_find(config, "groups per token") if groups > 1 else None,
        layer_indices=indices, total_layers=layers,
    )


def _read_config(path: Path) -> Config:
    if not os.path.lexists(path):
        raise InputError(f"{path}: not there; give the folder of a Hugging Face checkpoint")
    config = read_json(path, finite=False)      # some architectures write a limit as Infinity
    if not isinstance(config, dict):
        raise InputError(f"{path}: is not a JSON object, so not a checkpoint's configuration")
    return config


def _language_model(config: Config) -> Config:
    """The part that describes the MoE layers, with the outer fields where it has none."""
    for name in _NESTED:
        inner = config.get(name)
        if isinstance(inner, dict):
            return _language_model({**config, name: None, **_set_fields(inner, name)})
    return config


def _set_fields(inner: Config, name: str) -> Config:
    """A nested part's own fields; only a whole nested model brings its model_type along."""
    return {k: v for k, v in inner.items() if not (name == "ffn_config" and k == "model_type")}


def _find(config: Config, quantity: str) -> int | None:
    """The first of the quantity's fields that is set; of a list per layer, its largest entry."""
    for field in FIELDS[quantity]:
        value = config.get(field)
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            return int(max(value))
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value)
    return None


def _moe_layers(config: Config, architecture: str, layers: int) -> tuple[int, ...]:
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list):
        return tuple(i for i, kind in enumerate(kinds) if kind != "dense")
    return tuple(i for i in _RULES[architecture](config, layers) if i < layers)


def _shared_experts(config: Config, architecture: str) -> int:
    if architecture in _ALWAYS_ONE_SHARED:
        return 1
    count = _find(config, "shared")
    return count if count is not None else int(bool(_find(config, "shared width")))


def _dtype_bytes(whole: Config, config: Config) -> float:
    """Bytes of a stored number without quantisation; 2 where the configuration is silent."""
    for part in (config, whole):
        for field in ("dtype", "torch_dtype"):
            if part.get(field) in _DTYPE_BYTES:
                return _DTYPE_BYTES[part[field]]
    return 2.0


def _weight_bytes(
    path: Path, whole: Config, config: Config, shape: tuple[int | None, int | None, int]
) -> tuple[float, int]:
    """Bytes per weight of an expert, and bytes of scales per expert in addition."""
    quantised = config.get("quantization_config") or whole.get("quantization_config")
    if not isinstance(quantised, dict):
        return _dtype_bytes(whole, config), 0
    method = str(quantised.get("quant_method", "")).lower()
    if method in ("fp8", "finegrained_fp8", "fbgemm_fp8"):
        return 1.0, _block_scale_bytes(quantised.get("weight_block_size"), shape)
    if method == "mxfp4":
        return 0.5 + 1 / 32, 0  # 4 bits and one 8-bit scale per 32 weights
    bits = _bits(quantised, method)
    if bits is None:
        raise InputError(
            f"{path}: quantization_config {method!r} is not known, so the experts' bytes are not; "
            f"{BY_HAND} with bytes_per_parameter=…"
        )
    group = quantised.get("group_size")
    per_group = 2.0 + bits / 8  # a 16-bit scale and a zero point
    return bits / 8 + (per_group / group if isinstance(group, int) and group > 0 else 0.0), 0


def _bits(quantised: Config, method: str) -> float | None:
    if isinstance(quantised.get("bits"), int):  # gptq, awq, auto-round
        return float(quantised["bits"])
    if method == "bitsandbytes":
        return 4.0 if quantised.get("load_in_4bit") else 8.0
    groups = quantised.get("config_groups")
    if isinstance(groups, dict) and groups:  # compressed-tensors, modelopt
        weights = next(iter(groups.values())).get("weights") or {}
        if isinstance(weights.get("num_bits"), int):
            return float(weights["num_bits"])
    return None


def _block_scale_bytes(block: Any, shape: tuple[int | None, int | None, int]) -> int:
    """float32 scales, one per block of each matrix; one per matrix without blocks."""
    hidden, width, matrices = shape
    if not (isinstance(block, list) and len(block) == 2 and hidden and width):
        return 4 * matrices
    blocks = math.ceil(hidden / int(block[0])) * math.ceil(width / int(block[1]))
    return 4 * matrices * blocks


def vocabulary_size(folder: Path) -> int | None:
    """The checkpoint's vocab_size; None where its config.json does not say."""
    size = _language_model(_read_config(folder / "config.json")).get("vocab_size")
    return size if isinstance(size, int) else None
