"""The tensors of one expert as a checkpoint would hold them, listed one by one.

A slow second reckoning of what a configuration means, apart from the product's: it writes down
every tensor of an expert with its shape and the bytes of an element, for the formats that
published configurations use, and walks the layers one at a time. The format is found by reading
the files as text. Good for published files that say one format for all their experts.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

Tensor = tuple[int, int, int]                     # rows, columns, bytes of an element
FIRST_RECKONING = Path(__file__).with_name("published_configs.csv")


def published_folder() -> Path | None:
    """Where aiconfigurator-core keeps its models' configurations; None where it is not there."""
    found = importlib.util.find_spec("aiconfigurator_core")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "model_configs"
    return folder if folder.is_dir() else None


def first_reckoning() -> dict[str, dict[str, int]]:
    """What was reckoned by hand, by the model's name."""
    with FIRST_RECKONING.open() as file:
        return {
            row["model"]: {key: int(value) for key, value in row.items()
                           if key not in ("model", "reckoned")}
            for row in csv.DictReader(file)
        }


def second_reckoning(folder: Path, model: str) -> dict[str, int]:
    """The same figures from the published files, tensor by tensor and layer by layer."""
    whole = json.loads((folder / f"{model}_config.json").read_text())
    text = whole.get("text_config") or whole
    beside = folder / f"{model}_hf_quant_config.json"
    said = json.dumps(whole) + (beside.read_text() if beside.is_file() else "")
    moe = [layer for layer in range(_layers(text)) if _is_moe(text, layer)]
    hidden = _first(text, "moe_latent_size", "routed_expert_hidden_size", "hidden_size")
    width = _first(text, "moe_intermediate_size", "intermediate_size")
    tensors = list(_tensors(_format(said), hidden, width, gated="relu2" not in said))
    if whole["model_type"] == "gpt_oss":
        tensors += [(1, width, 2), (1, width, 2), (1, hidden, 2)]
    return {
        "first": moe[0], "last": moe[-1], "layers": len(moe),
        "experts": _first(text, "n_routed_experts", "num_local_experts", "num_experts"),
        "top_k": _first(text, "num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
        "hidden": hidden, "intermediate": width, "shared": _shared(whole, text),
        "bytes": sum(rows * columns * size for rows, columns, size in tensors),
    }


def _first(text: dict[str, Any], *names: str) -> int:
    return int(next(text[name] for name in names if text.get(name)))


def _layers(text: dict[str, Any]) -> int:
    pattern = text.get("layers_block_type") or text.get("hybrid_override_pattern")
    return len(pattern) if pattern else int(text["num_hidden_layers"])


def _is_moe(text: dict[str, Any], layer: int) -> bool:
    pattern = text.get("layers_block_type") or text.get("hybrid_override_pattern")
    if pattern:
        return pattern[layer] in ("moe", "E")
    if isinstance(text.get("moe_layer_freq"), list):
        return text["moe_layer_freq"][layer] == 1
    if text.get("interleave_moe_layer_step"):
        return (layer + 1) % int(text["interleave_moe_layer_step"]) == 0
    return layer >= (text.get("first_k_dense_replace") or 0)


def _shared(whole: dict[str, Any], text: dict[str, Any]) -> int:
    for name in ("n_shared_experts", "num_shared_experts"):
        if text.get(name):
            return int(text[name])
    width = text.get("shared_expert_intermediate_size")
    return 1 if width or whole["model_type"] == "llama4" else 0


def _format(said: str) -> str:
    flat = said.replace(" ", "").replace("\n", "").lower()
    for mark, form in (
        ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ('"expert_dtype":"fp4"', "mxfp4"),
        ('"format":"pack-quantized"', "int4"), ('"weight_block_size":[128,128]', "fp8 blocks"),
        ('"quant_algo":"fp8"', "fp8"),
    ):
        if mark in flat:
            return form
    return "bf16"


def _tensors(form: str, hidden: int, width: int, gated: bool) -> Iterator[Tensor]:
    into = 2 if gated else 1
    for rows, columns in ((width, hidden),) * into + ((hidden, width),):
        if form == "bf16":
            yield rows, columns, 2
        elif form.startswith("fp8"):
            yield rows, columns, 1
            if form == "fp8 blocks":
                yield ceil(rows / 128), ceil(columns / 128), 4
        elif form == "int4":                       # eight to a 32-bit word, 16-bit scales
            yield rows, columns // 8, 4
            yield rows, columns // 32, 2
        else:                                      # two to a byte, 8-bit scales
            yield rows, columns // 2, 1
            yield rows, columns // (16 if form == "nvfp4" else 32), 1
