"""The files that describe a model: its configuration, and what lies beside it.

`find_files` takes what people name: a checkpoint's folder, a config.json (whatever stands before
that in its name) or Mistral's params.json. Beside it a quantiser may have left a file of its own,
and the weights may be there. Knows names of files and JSON. Knows nothing of what fields mean.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...foundation.documents import read_json

CONFIG, PARAMS = "config.json", "params.json"
# Files that quantisers write beside a configuration, the most explicit first.
SIDECARS = (
    "hf_quant_config.json",              # ModelOptimizer
    "quantization_config.json",
    "quantize_config.json",              # GPTQ
    "quant_config.json",                 # AWQ
    "quant_model_description.json",      # msmodelslim: a word for each tensor
    "quant_model_description_w8a8_dynamic.json",
    "quant_model_description_w8a8.json",
    "quant_model_description_w4a8_dynamic.json",
)


@dataclass(frozen=True)
class ModelFiles:
    """A model's configuration, the quantiser's file beside it, and where weights may lie."""

    path: Path                        # of the configuration: errors begin with it
    config: dict[str, Any]
    sidecar: dict[str, Any] | None
    sidecar_name: str | None
    folder: Path

    @property
    def name(self) -> str:
        """What the model may be called: its folder, or what stands before config.json."""
        stem = self.path.name.removesuffix(CONFIG).removesuffix(PARAMS).rstrip("_-.")
        return stem or self.folder.resolve().name


def find_files(source: Path) -> ModelFiles:
    """The files that `source` means. Raises InputError naming what is missing or no JSON object."""
    path = source
    if source.is_dir() or not os.path.lexists(source):
        path = source / CONFIG
        if not os.path.lexists(path) and os.path.lexists(source / PARAMS):
            path = source / PARAMS
    if not os.path.lexists(path):
        raise InputError(
            f"{path}: not there; give the folder of a Hugging Face checkpoint, its config.json or "
            "its params.json"
        )
    before = path.name.removesuffix(CONFIG) if path.name.endswith(CONFIG) else ""
    for name in SIDECARS:
        beside = path.with_name(before + name)
        if beside.is_file():
            return ModelFiles(path, _object(path), _object(beside), beside.name, path.parent)
    return ModelFiles(path, _object(path), None, None, path.parent)


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path, finite=False)      # some architectures write a limit as Infinity
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object, so not a checkpoint's configuration")
    return value
