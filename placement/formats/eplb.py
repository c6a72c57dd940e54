"""DeepSeek EPLB's three tensors: phy2log [L, S], log2phy [L, E, X] (-1 = none), logcnt [L, E].

As .npz or .pt with these names. Slot s lies on device s // (S / devices). EPLB lists an expert's
copies in order of creation, which slots alone do not tell; we write ascending slots.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...traces.atomic_file import replacing
from ...traces.spec import ModelSpec
from ..plan import Plan
from .full_rows import full_rows, model_layers
from .imported import ImportedPlan, Known, build

HOLDS_DUPLICATES = True
HOLDS_UNEVEN = False
NAMES = ("phy2log", "log2phy", "logcnt")

IntArray = npt.NDArray[np.int64]


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """.pt if the name says so, else .npz."""
    phy2log = full_rows(plan, "EPLB")
    model_layers(plan, model)
    log2phy, logcnt = _by_expert(phy2log, plan.num_experts)
    arrays = dict(zip(NAMES, (phy2log, log2phy, logcnt), strict=True))
    with replacing(path) as file:
        if path.suffix == ".pt":
            import torch  # slow to import, and only this writes .pt

            torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
        else:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    return ("copies of an expert are listed by slot, not in EPLB's order of creation",)


def read(known: Known) -> ImportedPlan:
    """phy2log is the plan; log2phy and logcnt must agree with it where they are present."""
    arrays = _arrays(known)
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise InputError(f"{known.path}: {name} holds {array.dtype}, not whole numbers")
    if "phy2log" not in arrays or arrays["phy2log"].ndim != 2 or not arrays["phy2log"].size:
        raise InputError(f"{known.path}: not EPLB's tensors: it needs phy2log [layers, slots]")
    phy2log = arrays["phy2log"].astype(np.int64)
    names = [f"layer {i}" for i in range(len(phy2log))]
    model = known.model
    indices = model.own_layer_indices() if model else ()
    if model is not None and model.num_layers != len(phy2log):
        raise InputError(
            f"{known.path}: {len(phy2log)} layers, the model {model.name} has {model.num_layers}"
        )
    imported = build(known, phy2log.tolist(), names, indices, "eplb")
    _check_agreement(known, arrays, phy2log, imported.plan.num_experts)
    return imported


def _by_expert(phy2log: IntArray, experts: int) -> tuple[IntArray, IntArray]:
    """log2phy in ascending slots and logcnt."""
    layers = len(phy2log)
    logcnt = np.stack([np.bincount(row, minlength=experts) for row in phy2log])
    log2phy = np.full((layers, experts, int(logcnt.max())), -1, np.int64)
    for layer, row in enumerate(phy2log):
        order = np.argsort(row, kind="stable")
        rank = np.arange(len(row)) - np.repeat(
            np.concatenate(([0], np.cumsum(logcnt[layer])[:-1])), logcnt[layer]
        )
        log2phy[layer, row[order], rank] = order
    return log2phy, logcnt


def _check_agreement(
    known: Known, arrays: dict[str, Any], phy2log: IntArray, experts: int
) -> None:
    log2phy, logcnt = _by_expert(phy2log, experts)
    if "logcnt" in arrays and not np.array_equal(arrays["logcnt"], logcnt):
        raise InputError(f"{known.path}: logcnt does not count the copies in phy2log")
    if "log2phy" in arrays:
        given = np.sort(np.where(arrays["log2phy"] < 0, -1, arrays["log2phy"]), axis=-1)
        if given.ndim != 3 or given.shape[:2] != log2phy.shape[:2]:
            raise InputError(f"{known.path}: log2phy must be [layers, experts, copies]")
        width = max(given.shape[2], log2phy.shape[2])
        if not np.array_equal(_padded(given, width), _padded(np.sort(log2phy, axis=-1), width)):
            raise InputError(f"{known.path}: log2phy and phy2log name different slots")


def _padded(sorted_LEX: IntArray, width: int) -> IntArray:
    missing = width - sorted_LEX.shape[2]
    return np.pad(sorted_LEX, ((0, 0), (0, 0), (missing, 0)), constant_values=-1)


def _arrays(known: Known) -> dict[str, Any]:
    content = io.BytesIO(known.bytes())
    if known.path.suffix == ".pt":
        import torch  # slow to import, and only this reads .pt

        try:
            loaded = torch.load(content, weights_only=True, map_location="cpu")
            return {name: loaded[name].numpy() for name in NAMES if name in loaded}
        except Exception as error:  # torch raises many kinds on a file that is not its own
            raise InputError(f"{known.path}: not a torch file of plain tensors") from error
    try:
        with np.load(content, allow_pickle=False) as stored:
            return {name: stored[name] for name in NAMES if name in stored}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{known.path}: not an .npz of plain arrays") from error
