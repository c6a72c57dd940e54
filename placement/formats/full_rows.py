"""Plans as one full row of global slots per layer, for engines that know no empty slot.

Knows plans and layer numbers. Used by the exporters whose files are such rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...traces.spec import ModelSpec
from ..plan import EMPTY, Plan


def full_rows(plan: Plan, engine: str) -> npt.NDArray[np.int64]:
    """[L, S] expert of every slot. Raises InputError where slots are empty, naming a way out."""
    empty = plan.slots == EMPTY
    if empty.any():
        layer, device, _ = np.argwhere(empty)[0]
        raise InputError(
            f"{engine} needs {plan.slots_per_device} filled slots on every device in every layer; "
            f"this plan leaves {int(empty.sum())} empty, the first on device {device} in layer "
            f"{layer}. The nearest plan it can hold fills them with further copies: export with "
            "--nearest (nearest=True), or plan with equal slots"
        )
    return plan.slots.reshape(plan.num_layers, -1).astype(np.int64)


def refuse_duplicates(plan: Plan, engine: str, why: str) -> None:
    """Raises InputError when a device holds an expert twice in a layer."""
    twice = np.argwhere(plan.copies_LGE() > 1)
    if len(twice):
        layer, device, expert = twice[0]
        raise InputError(
            f"{engine} {why}; device {device} holds expert {expert} twice in layer {layer} "
            f"({plan.duplicates} such copies). The nearest plan it can hold puts another expert in "
            "their place: export with --nearest (nearest=True)"
        )


def model_layers(plan: Plan, model: ModelSpec | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(the model's own number of each layer [L], notes). The plan's own word goes first."""
    if model is not None and model.num_layers != plan.num_layers:
        raise InputError(
            f"the plan has {plan.num_layers} layers, the model {model.name} {model.num_layers}"
        )
    if plan.layer_indices:
        return plan.layer_indices, ()
    if model is not None:
        return model.own_layer_indices(), ()
    note = "the plan does not say which model layers are MoE: counted from 0 without a gap"
    return tuple(range(plan.num_layers)), (note,)
