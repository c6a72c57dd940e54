"""DeepSeek EPLB's tensors: phy2log [L, S], log2phy [L, E, X], logcnt [L, E], as .npz or .pt.

What rebalance_experts returns. phy2log alone is a plan; the other two follow from it but for the
order of an expert's replicas, and are checked against it where present. X pads with -1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...foundation.arrays import IntArray
from ...foundation.atomic_file import replacing
from ...traces.model_spec import ModelSpec
from ..plan import EMPTY, Plan
from .array_files import read_npz, read_pt, whole_array
from .even_rows import even_rows_LS
from .imported import (
    MAX_EXPERTS,
    ImportedPlan,
    Known,
    build_plan,
    moe_layer_names,
    shown,
    split_rows,
)

NAMES = ("phy2log", "log2phy", "logcnt")


def read(known: Known) -> ImportedPlan:
    """Raises InputError where the three tensors contradict each other, naming layer and expert."""
    tensors, notes = _tensors(known.path)
    phy2log = whole_array(tensors["phy2log"], "layer, slot", f"{known.path}: phy2log")
    bad = np.argwhere((phy2log < 0) | (phy2log >= MAX_EXPERTS))
    if len(bad):
        layer, slot = bad[0]
        raise InputError(
            f"{known.path}: MoE layer {layer}, slot {slot}: {phy2log[layer, slot]} is no expert id"
        )
    stated = None
    if "logcnt" in tensors:
        stated = whole_array(tensors["logcnt"], "layer, expert", f"{known.path}: logcnt").shape[1]
    names = moe_layer_names(len(phy2log))
    slots = split_rows(phy2log.tolist(), names, known.devices(), known.path)
    num_experts, inferred = known.experts(int(phy2log.max()), stated)
    plan = build_plan(
        known, slots, num_experts, names, known.layers(len(names)), engine="eplb", dispatch="even"
    )
    if "logcnt" in tensors:
        _check_logcnt(known.path, plan, tensors["logcnt"])
    if "log2phy" in tensors:
        _check_log2phy(known.path, _log2phy(plan, phy2log), tensors["log2phy"])
    return ImportedPlan(plan, inferred + notes)


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """log2phy lists an expert's slots ascending."""
    phy2log = even_rows_LS(plan, "EPLB")
    tensors = {"phy2log": phy2log, "log2phy": _log2phy(plan, phy2log), "logcnt": plan.replicas_LE}
    with replacing(path) as file:
        if path.suffix == ".pt":
            import torch

            torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, file)
        else:
            np.savez(file, **tensors)  # type: ignore[arg-type]
    return ("log2phy lists replicas by slot; rebalance_experts lists them as it made them",)


def _tensors(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """By name, and notes; a plain tuple of three is what rebalance_experts returned."""
    found = read_pt(path) if path.suffix == ".pt" else read_npz(path)
    if isinstance(found, (tuple, list)) and len(found) == len(NAMES):
        found = dict(zip(NAMES, found, strict=True))
    if not isinstance(found, dict) or "phy2log" not in found:
        raise InputError(
            f"{path}: must hold {', '.join(NAMES)}; is {shown(found)} without phy2log"
        )
    unread = sorted(shown(key) for key in found if key not in NAMES)
    return found, ((f"left unread: {', '.join(unread)}",) if unread else ())


def _log2phy(plan: Plan, phy2log: IntArray) -> IntArray:
    """[L, E, X] slots of every expert, ascending, -1 behind them."""
    replicas_LE = plan.replicas_LE
    out = np.full((*replicas_LE.shape, int(replicas_LE.max())), EMPTY, np.int64)
    for layer, row in enumerate(phy2log):
        order = np.argsort(row, kind="stable")
        first_E = np.cumsum(replicas_LE[layer]) - replicas_LE[layer]
        out[layer, row[order], np.arange(len(row)) - first_E[row[order]]] = order
    return out


def _check_logcnt(path: Path, plan: Plan, given: Any) -> None:
    logcnt = whole_array(given, "layer, expert", f"{path}: logcnt")
    replicas_LE = plan.replicas_LE
    _require_shape(logcnt.shape, replicas_LE.shape, f"{path}: logcnt")
    odd = np.argwhere(logcnt != replicas_LE)
    if len(odd):
        layer, expert = odd[0]
        raise InputError(
            f"{path}: MoE layer {layer}, expert {expert}: logcnt says {logcnt[layer, expert]} "
            f"replicas, phy2log holds {replicas_LE[layer, expert]}: save all three anew"
        )


def _check_log2phy(path: Path, expected: IntArray, given: Any) -> None:
    log2phy = whole_array(given, "layer, expert, replica", f"{path}: log2phy")
    _require_shape(log2phy.shape[:2], expected.shape[:2], f"{path}: log2phy")
    width = max(log2phy.shape[2], expected.shape[2])
    odd = np.argwhere((_sorted(log2phy, width) != _sorted(expected, width)).any(axis=2))
    if len(odd):
        layer, expert = odd[0]
        raise InputError(
            f"{path}: MoE layer {layer}, expert {expert}: log2phy does not name the slots that "
            "phy2log gives this expert: save all three anew"
        )


def _require_shape(given: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    if given != expected:
        raise InputError(
            f"{where} has {given[0]} layers of {given[1]} experts, phy2log {expected[0]} of "
            f"{expected[1]}: save all three anew"
        )


def _sorted(table_LEX: IntArray, width: int) -> IntArray:
    """Each expert's slots ascending behind the padding: the order of replicas is free."""
    padded = np.full((*table_LEX.shape[:2], width), EMPTY, np.int64)
    padded[:, :, : table_LEX.shape[2]] = table_LEX
    return np.sort(padded, axis=2)
