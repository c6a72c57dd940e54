"""SGLang's expert distribution recorder: its three kinds of .pt files.

stat: counts of logical experts, summed over ranks. per_pass: counts of physical slots per forward
pass and rank. per_token: the slots every token was sent to. Slots become experts through the map
in the file, which is the last active one: a recording that spans a rebalance cannot be mapped
back, and nothing in the file shows that it does. Files are read with weights_only, never unpickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..model_spec import MOST_EXPERTS
from ..profile import Profile
from .result import LOADS_ONLY, ImportResult
from .sglang_tokens import import_tokens
from .tensors import as_array, as_whole

_REBALANCE = (
    "whether the placement changed while recording: slots are mapped to experts by the last map"
)


def import_recorder(path: Path) -> ImportResult:
    """One recorder file, or a folder with the files of all ranks of one recording.

    Raises InputError on files of several kinds or maps, unreadable files, slots out of range.
    """
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: holds no .pt file of SGLang's recorder")
    dumps = [(file, _load(file)) for file in files]
    kinds = {_kind(file, dump) for file, dump in dumps}
    if len(kinds) > 1:
        raise InputError(f"{path}: mixes recordings of kinds {sorted(kinds)}: give one of them")
    kind = kinds.pop()
    if kind == "stat":
        return _import_stat(dumps)
    map_LS = _common_map(dumps)
    if kind == "per_pass":
        return _import_passes(path, dumps, map_LS)
    result = import_tokens(path, [(file, dump["records"]) for file, dump in dumps], map_LS)
    return ImportResult(
        result.format, trace=result.trace, notes=result.notes,
        cannot_tell=(*result.cannot_tell, _REBALANCE),
    )


def _load(path: Path) -> dict[str, Any]:
    import torch

    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: cannot be read without unpickling code, which is never done: no recorder "
            "wrote it so; record it again"
        ) from error
    except Exception as error:  # torch raises many kinds on a broken or hostile file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: cannot be read as a recorder's file ({text}): copy or record it again"
        ) from error
    if not isinstance(dump, dict):
        raise InputError(f"{path}: holds a {type(dump).__name__}, not a recorder's dictionary")
    return dump


def _kind(path: Path, dump: dict[str, Any]) -> str:
    if "logical_count" in dump:
        return "stat"
    records = dump.get("records")
    if isinstance(records, list) and not all(isinstance(r, dict) for r in records):
        raise InputError(f"{path}: its records are no dictionaries, so not SGLang's")
    if isinstance(records, list) and "last_physical_to_logical_map" in dump:
        if not records:
            raise InputError(f"{path}: holds no forward pass: record while traffic runs")
        if any("topk_ids_of_layer" in r for r in records):
            return "per_token"
        if all("global_physical_count" in r for r in records):
            return "per_pass"
    raise InputError(
        f"{path}: keys {sorted(map(str, dump))[:6]} are none of SGLang's stat, per_pass and "
        "per_token recordings"
    )


def _import_stat(dumps: list[tuple[Path, dict[str, Any]]]) -> ImportResult:
    """The buffer is a ring: its rows are in no known order, so they are summed to one window."""
    if len(dumps) > 1:
        raise InputError(
            f"{dumps[1][0]}: a stat recording is one file that holds all ranks; give one of "
            f"{[p.name for p, _ in dumps][:4]}"
        )
    path, dump = dumps[0]
    count = as_array(dump["logical_count"], f"{path}: logical_count")
    if count.ndim not in (2, 3):
        raise InputError(
            f"{path}: logical_count {list(count.shape)} is not [layers, experts] or "
            "[buffer, layers, experts]"
        )
    load_LE = count.sum(axis=0, dtype=np.float64) if count.ndim == 3 else count
    layers = _layers_with_load(path, load_LE)
    return ImportResult(
        format="SGLang stat",
        profile=Profile.from_loads(load_LE[layers], layer_indices=tuple(layers)),
        cannot_tell=(
            "how many experts a token chooses: K is taken as 1", *LOADS_ONLY, "prefill or decode",
            "the order of its buffer rows, which wrap around",
        ),
        notes=_dense_note(len(load_LE), layers),
    )


def _import_passes(
    path: Path, dumps: list[tuple[Path, dict[str, Any]]], map_LS: npt.NDArray[np.int64]
) -> ImportResult:
    """Ranks are summed per forward pass; every pass is a window."""
    experts = int(map_LS.max()) + 1
    by_pass: dict[int, npt.NDArray[np.float64]] = {}
    for file, dump in dumps:
        for record in dump["records"]:
            number = as_whole(record.get("forward_pass_id"), f"{file}: forward_pass_id")
            count_LS = as_array(
                record["global_physical_count"], f"{file}, pass {number}: global_physical_count"
            )
            if count_LS.shape != map_LS.shape:
                raise InputError(
                    f"{file}: counts {list(count_LS.shape)} do not fit the map "
                    f"{list(map_LS.shape)} of [layers, slots]"
                )
            load = by_pass.setdefault(number, np.zeros((len(map_LS), experts)))
            for layer in range(len(map_LS)):
                load[layer] += np.bincount(map_LS[layer], count_LS[layer], experts)
    order = sorted(number for number, load in by_pass.items() if load.any())
    if not order:
        raise InputError(f"{path}: no forward pass holds a token")
    load_WLE = np.stack([by_pass[number] for number in order])
    layers = _layers_with_load(path, load_WLE.sum(axis=0))
    return ImportResult(
        format="SGLang per_pass",
        profile=Profile.from_loads(load_WLE[:, layers], layer_indices=tuple(layers)),
        cannot_tell=(
            "how many experts a token chooses: K is taken as 1", *LOADS_ONLY, "prefill or decode",
            _REBALANCE,
        ),
        notes=(f"{len(order)} passes of {len(dumps)} files", *_dense_note(len(map_LS), layers)),
    )


def _common_map(dumps: list[tuple[Path, dict[str, Any]]]) -> npt.NDArray[np.int64]:
    """[L, S] expert of each slot, which must be the same in all files."""
    first_path, first = dumps[0]
    name = "last_physical_to_logical_map"
    map_LS = as_array(first[name], f"{first_path}: {name}")
    if map_LS.ndim != 2 or map_LS.dtype.kind not in "iu" or 0 in map_LS.shape or not (
        0 <= map_LS.min() <= map_LS.max() < MOST_EXPERTS
    ):
        raise InputError(
            f"{first_path}: {name} {list(map_LS.shape)} is not [layers, slots] of expert ids in "
            f"[0, {MOST_EXPERTS})"
        )
    for path, dump in dumps[1:]:
        if not np.array_equal(as_array(dump[name], f"{path}: {name}"), map_LS):
            raise InputError(
                f"{path}: its slot map differs from that of {first_path.name}: the placement "
                "changed between them; record again without rebalancing"
            )
    return map_LS.astype(np.int64)


def _layers_with_load(path: Path, load_LE: npt.NDArray[Any]) -> list[int]:
    layers = [int(i) for i in np.flatnonzero(load_LE.sum(axis=1))]
    if not layers:
        raise InputError(f"{path}: all counts are zero: record while traffic runs")
    return layers


def _dense_note(total: int, layers: Iterable[int]) -> tuple[str, ...]:
    dense = sorted(set(range(total)) - set(layers))
    return (f"layers {dense} hold no counts and are taken as dense",) if dense else ()
