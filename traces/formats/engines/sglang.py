"""SGLang's expert distribution recorder: its three kinds of .pt files.

stat: counts of logical experts, summed over ranks. per_pass: counts of physical slots per forward
pass and rank. per_token: the slots every token was sent to. Slots become experts through the map
in the file, which is the last active one: a recording that spans a rebalance cannot be mapped
back, and nothing in the file shows that it does. Files are read with weights_only, never unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import InputError
from ...model_spec import MOST_EXPERTS
from ..asked import Asked
from ..cleaning.loads import loads_result
from ..result import LOADS_ONLY, NO_PHASE, ImportResult
from ..tensors import as_array, as_whole
from .sglang_tokens import import_tokens

Dumps = list[tuple[Path, dict[str, Any]]]

_REBALANCE = (
    "whether the placement changed while recording: slots are mapped to experts by the last map"
)


def is_recorder(dump: Any) -> bool:
    """Whether a .pt file holds what the recorder writes."""
    return isinstance(dump, dict) and ("logical_count" in dump or "records" in dump)


def import_recorder(path: Path, dumps: Dumps, asked: Asked) -> ImportResult:
    """The recorder's files of all ranks of one recording; path: the file or folder they are in.

    Raises InputError on files of several kinds or maps, slots out of range.
    """
    kinds = {_kind(file, dump) for file, dump in dumps}
    if len(kinds) > 1:
        raise InputError(f"{path}: mixes recordings of kinds {sorted(kinds)}: give one of them")
    kind = kinds.pop()
    if kind == "stat":
        return _import_stat(dumps, asked)
    map_LS = _common_map(dumps)
    if kind == "per_pass":
        return _import_passes(path, dumps, map_LS, asked)
    files = [(file, dump["records"]) for file, dump in dumps]
    result = import_tokens(path, files, map_LS, asked)
    return ImportResult(
        result.format, trace=result.trace, notes=result.notes,
        cannot_tell=(*result.cannot_tell, _REBALANCE),
    )


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


def _import_stat(dumps: Dumps, asked: Asked) -> ImportResult:
    """The buffer is a ring: its rows are in no known order, so they are summed to one window."""
    if len(dumps) > 1:
        raise InputError(
            f"{dumps[1][0]}: a stat recording is one file that holds all ranks; give one of "
            f"{[p.name for p, _ in dumps][:4]}"
        )
    path, dump = dumps[0]
    return import_logical_count(path, dump["logical_count"], "SGLang stat", asked)


def import_logical_count(path: Path, value: Any, format: str, asked: Asked) -> ImportResult:
    """SGLang's logical_count, whatever file it is in: [L, E], or [buffer, L, E]."""
    count = as_array(value, f"{path}: logical_count")
    if count.ndim not in (2, 3):
        raise InputError(
            f"{path}: logical_count {list(count.shape)} is not [layers, experts] or "
            "[buffer, layers, experts]"
        )
    load_LE = count.sum(axis=0, dtype=np.float64) if count.ndim == 3 else count
    return loads_result(
        load_LE, asked, f"{path}: logical_count", format=format, axes="LE",
        cannot_tell=(*LOADS_ONLY, NO_PHASE, "the order of its buffer rows, which wrap around"),
    )


def _import_passes(
    path: Path, dumps: Dumps, map_LS: npt.NDArray[np.int64], asked: Asked
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
    return loads_result(
        np.stack([by_pass[number] for number in order]), asked, str(path), format="SGLang per_pass",
        axes="LE", notes=(f"{len(order)} passes of {len(dumps)} files",),
        cannot_tell=(*LOADS_ONLY, NO_PHASE, _REBALANCE),
    )


def _common_map(dumps: Dumps) -> npt.NDArray[np.int64]:
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
