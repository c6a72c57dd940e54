"""OmniPlacement's plan: an .npy of 0 and 1, [rank, layer, expert].

Layers and ranks may hold different numbers of experts. The order of a rank's slots is not in it,
and a second copy on one rank cannot be.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...traces.atomic_file import replacing
from ...traces.spec import ModelSpec
from ..plan import EMPTY, Plan
from .full_rows import model_layers, refuse_duplicates
from .imported import ImportedPlan, Known, plan_of

HOLDS_DUPLICATES = False
HOLDS_UNEVEN = True


def write(plan: Plan, path: Path, model: ModelSpec | None) -> tuple[str, ...]:
    """Raises InputError on a plan that holds an expert twice on a device."""
    refuse_duplicates(plan, "OmniPlacement", "says of each rank only whether it holds an expert")
    model_layers(plan, model)
    held_GLE = plan.copies_LGE().transpose(1, 0, 2).astype(np.int32)
    with replacing(path) as file:
        np.save(file, held_GLE)
    return ("the order of slots on a rank is not in the file",)


def read(known: Known) -> ImportedPlan:
    """Slots of a device in order of expert id; devices with fewer experts end in empty slots."""
    try:
        held_GLE = np.load(io.BytesIO(known.bytes()), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{known.path}: not an .npy of plain numbers") from error
    if not isinstance(held_GLE, np.ndarray) or held_GLE.ndim != 3 or 0 in held_GLE.shape:
        raise InputError(f"{known.path}: OmniPlacement's plan is an array [rank, layer, expert]")
    if held_GLE.dtype.kind not in "iub" or not np.isin(held_GLE, (0, 1)).all():
        raise InputError(f"{known.path}: holds values other than 0 and 1")
    ranks, layers, experts = held_GLE.shape
    for what, given, found in (
        ("devices", known.num_devices, ranks), ("experts", known.num_experts, experts),
        ("layers", known.model.num_layers if known.model else None, layers),
    ):
        if given not in (None, found):
            raise InputError(f"{known.path}: the file has {found} {what}, not {given}")
    missing = np.argwhere(held_GLE.sum(axis=0) == 0)
    if len(missing):
        raise InputError(
            f"{known.path}: layer {missing[0][0]}: no rank holds expert {missing[0][1]} "
            f"({len(missing)} such experts)"
        )
    held_LGE = held_GLE.transpose(1, 0, 2).astype(bool)
    width = int(held_LGE.sum(axis=2).max())
    order = np.argsort(~held_LGE, axis=2, kind="stable")[:, :, :width]
    slots = np.where(np.take_along_axis(held_LGE, order, axis=2), order, EMPTY)
    indices = known.model.own_layer_indices() if known.model else ()
    notes = ("slots of a rank are in order of expert id: the file knows no order",)
    return ImportedPlan(plan_of(slots, experts, indices, "omni"), notes)
