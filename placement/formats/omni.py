"""OmniPlacement's plan: an .npy of 0/1, int32 [rank, layer, expert].

Layers are MoE layers; they and the ranks may hold different numbers of experts. The order of a
rank's slots is not in the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.atomic_file import replacing
from ...traces.model_spec import ModelSpec
from ..plan import EMPTY, Plan
from .array_files import read_npy, whole_array
from .even_rows import refuse_duplicates
from .imported import ImportedPlan, Known, build_plan, moe_layer_names


def read(known: Known) -> ImportedPlan:
    """Slots of a rank in order of expert id. Raises InputError naming rank, layer and expert."""
    array = read_npy(known.path)
    held_GLE = whole_array(
        array.astype(np.int8) if array.dtype == bool else array, "rank, layer, expert",
        str(known.path),
    )
    odd = np.argwhere((held_GLE != 0) & (held_GLE != 1))
    if len(odd):
        rank, layer, expert = odd[0]
        raise InputError(
            f"{known.path}: rank {rank}, MoE layer {layer}, expert {expert} is "
            f"{held_GLE[rank, layer, expert]}: must be 1 (held) or 0"
        )
    devices, layers, experts = held_GLE.shape
    known.devices(devices)
    known.experts(experts - 1, experts)
    held_LGE = held_GLE.transpose(1, 0, 2) == 1
    plan = build_plan(
        known, _slots(held_LGE), experts, moe_layer_names(layers), known.layers(layers),
        engine="omni", dispatch="even",
    )
    filled_LG = held_LGE.sum(axis=2)
    notes: tuple[str, ...] = (
        "the format has no slot order: a device's experts stand in order of id",
    )
    if filled_LG.min() < filled_LG.max():
        notes += (f"devices fill {filled_LG.min()} to {filled_LG.max()} slots in a layer",)
    return ImportedPlan(plan, notes)


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """Raises InputError on an expert twice on a device: 0/1 cannot say it."""
    refuse_duplicates(plan, "OmniPlacement", "its file says 0 or 1 per expert")
    with replacing(path) as file:
        np.save(file, plan.replicas_LGE().transpose(1, 0, 2).astype(np.int32))
    return ("the format has no slot order: it tells which device holds which expert",)


def _slots(held_LGE: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """[L, G, C]: ids ascending, EMPTY behind them."""
    width = max(int(held_LGE.sum(axis=2).max()), 1)
    order = np.argsort(~held_LGE, axis=2, kind="stable")[:, :, :width]
    held = np.take_along_axis(held_LGE, order, axis=2)
    slots: npt.NDArray[np.int64] = np.where(held, order, EMPTY)
    return slots
