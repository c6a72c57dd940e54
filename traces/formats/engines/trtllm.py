"""TensorRT-LLM's expert statistics: a folder of counts per iteration, layer and rank.

    meta_info.json          {"num_experts": 256, "num_experts_per_token": 8}
    rank{r}.safetensors     "{iteration}_{layer}" -> int64 [num_experts], this rank's counts
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import InputError
from ....foundation.documents import read_json
from ..asked import Asked
from ..cleaning.loads import loads_result
from ..result import LOADS_ONLY, NO_PHASE, ImportResult

META = "meta_info.json"
_RANK = re.compile(r"rank(\d+)\.safetensors")


def import_statistics(folder: Path, asked: Asked) -> ImportResult:
    """Sum the ranks and make every iteration a window. Layers keep the model's own indices.

    Raises InputError where ranks, iterations or layers are missing, or a count has a wrong shape.
    """
    experts, top_k = _meta(folder / META)
    files = sorted(
        (int(m[1]), p) for p in folder.iterdir() if (m := _RANK.fullmatch(p.name))
    )
    if not files or [r for r, _ in files] != list(range(len(files))):
        raise InputError(
            f"{folder}: needs rank0.safetensors, rank1.safetensors, … without a gap; it has ranks "
            f"{[r for r, _ in files]}"
        )
    by_key = _rank_counts(files[0][1], experts)
    for _, path in files[1:]:
        more = _rank_counts(path, experts)
        if more.keys() != by_key.keys():
            raise InputError(f"{path}: holds other iterations or layers than rank 0: copy it whole")
        by_key = {key: counts + more[key] for key, counts in by_key.items()}
    if not by_key:
        raise InputError(f"{files[0][1]}: holds no counts: record while traffic runs")
    keys = sorted(by_key)
    iterations, layers = _axes(folder, keys)
    shape = (len(iterations), len(layers), experts)
    load_WLE = np.stack([by_key[key] for key in keys]).reshape(shape)
    return loads_result(
        load_WLE, asked, str(folder), format="TensorRT-LLM statistics", axes="LE", numbers=layers,
        top_k=top_k, model_name=folder.name,
        cannot_tell=(*LOADS_ONLY, NO_PHASE, "which rank a token came from"),
        notes=(f"iterations {iterations[0]} to {iterations[-1]} of {len(files)} ranks",),
    )


def _meta(path: Path) -> tuple[int, int]:
    try:
        meta = read_json(path, finite=False)    # its numbers are checked below
        numbers = meta["num_experts"], meta["num_experts_per_token"]
    except InputError as error:
        raise InputError(
            f"{error}; it must say num_experts and num_experts_per_token"
        ) from error
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: must say num_experts and num_experts_per_token ({error!r})"
        ) from error
    if any(type(number) is not int or number < 1 for number in numbers):
        raise InputError(
            f"{path}: num_experts and num_experts_per_token must be whole numbers of at least 1, "
            f"not {numbers[0]!r} and {numbers[1]!r}"
        )
    return numbers


def _rank_counts(
    path: Path, experts: int
) -> dict[tuple[int, int], npt.NDArray[np.int64]]:
    """Counts of one rank by (iteration, layer)."""
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, Any] = load_file(path)
    except Exception as error:  # safetensors raises its own kinds
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error
    counts = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(\d+)_(\d+)", name)
        sound = tensor.dtype.kind in "iu" and tensor.shape == (experts,) and tensor.min() >= 0
        if not match or not sound:
            raise InputError(
                f"{path}: {name!r} {tensor.dtype} {list(tensor.shape)} is not a count per expert "
                f"'iteration_layer' [{experts}]; raw statistics are not read"
            )
        counts[int(match[1]), int(match[2])] = tensor.astype(np.int64)
    return counts


def _axes(folder: Path, keys: list[tuple[int, int]]) -> tuple[list[int], tuple[int, ...]]:
    """The iterations and layers, when every one of their pairs is there."""
    iterations = sorted({i for i, _ in keys})
    layers = tuple(sorted({layer for _, layer in keys}))
    if iterations != list(range(iterations[0], iterations[-1] + 1)):
        raise InputError(f"{folder}: iterations {iterations} have a gap: the dump is incomplete")
    if len(keys) != len(iterations) * len(layers):
        raise InputError(
            f"{folder}: {len(keys)} counts for {len(iterations)} iterations x {len(layers)} "
            "layers: the dump is incomplete"
        )
    return iterations, layers
