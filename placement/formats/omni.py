"""OmniPlacement's plan: an .npy of 0/1, [rank, layer, expert].

Layers and ranks may hold different numbers of experts; the order of a rank's slots is not in it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import InputError
from ...traces.atomic_file import replacing
from ..plan import EMPTY, Plan


def write(plan: Plan, path: Path) -> None:
    """Raises InputError on a plan that holds an expert twice on a device."""
    copies_LGE = plan.copies_LGE()
    if copies_LGE.max() > 1:
        layer, device, expert = np.argwhere(copies_LGE > 1)[0]
        raise InputError(f"layer {layer}, device {device} holds expert {expert} twice")
    with replacing(path) as file:
        np.save(file, copies_LGE.transpose(1, 0, 2).astype(np.int32))


def read(path: Path) -> Plan:
    """Slots of a device in order of expert id."""
    held_GLE = np.load(path, allow_pickle=False)
    held_LGE = held_GLE.transpose(1, 0, 2).astype(bool)
    order = np.argsort(~held_LGE, axis=2, kind="stable")[:, :, : held_LGE.sum(axis=2).max()]
    slots = np.where(np.take_along_axis(held_LGE, order, axis=2), order, EMPTY)
    return Plan(slots=slots.astype(np.int16), num_experts=held_LGE.shape[2])
