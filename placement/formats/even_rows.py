"""A plan as rows of equal slots, and the nearest plan that has them.

What SGLang, TensorRT-LLM, vllm-ascend and EPLB share: S slots per layer, slot s on device
s // (S / G), every slot filled, every layer alike. Knows nothing of their files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..plan import Plan

Step = tuple[int, int, int]      # layer, device, expert to drop | slots to fill


def even_rows_LS(plan: Plan, engine: str) -> npt.NDArray[np.int64]:
    """[L, S] experts of all slots, holes closed up, order kept.

    Raises InputError where devices or layers fill different numbers of slots: names the first odd
    one and the nearest plan without.
    """
    filled_LG = (plan.slots >= 0).sum(axis=2)
    if filled_LG.min() != filled_LG.max():
        raise InputError(_uneven(plan, filled_LG, engine))
    order = np.argsort(plan.slots < 0, axis=2, kind="stable")[:, :, : int(filled_LG[0, 0])]
    packed = np.take_along_axis(plan.slots, order, axis=2)
    return packed.reshape(plan.num_layers, -1).astype(np.int64)


def refuse_duplicates(plan: Plan, engine: str, why: str) -> None:
    """Raises InputError naming the first device with an expert twice."""
    twice = np.argwhere(plan.copies_LGE() > 1)
    if not len(twice):
        return
    layer, device, expert = (int(i) for i in twice[0])
    lacking = np.flatnonzero(plan.copies_LGE()[layer, device] == 0)
    instead = f" by one it lacks (expert {lacking[0]}, say)" if len(lacking) else ""
    more = f"; {plan.duplicates - 1} more such copies" if plan.duplicates > 1 else ""
    raise InputError(
        f"{engine} cannot hold an expert twice on one device: {why}; device {device} of "
        f"{layer_name(plan, layer)} holds expert {expert} twice{more}. Nearest plan: replace the "
        f"second copy{instead}, or plan with any method but eplb, which alone makes such copies"
    )


def layer_name(plan: Plan, layer: int) -> str:
    """How messages name a layer: by the model's own number where the plan has it."""
    if plan.layer_indices:
        return f"layer {plan.layer_indices[layer]}"
    return f"MoE layer {layer}"


def nearest_even(plan: Plan) -> tuple[int, list[Step], list[Step]]:
    """(C, drops, fills): fewest copies to drop or slots to fill until all hold C. Ties: lower C.

    A drop names an expert that keeps a copy elsewhere. Filling to the fullest always works.
    """
    filled_LG = (plan.slots >= 0).sum(axis=2)
    targets = np.unique(filled_LG)
    cost = [(int(np.abs(filled_LG - target).sum()), int(target)) for target in targets]
    for _, target in sorted(cost):
        drops = _drops(plan, filled_LG, target)
        if drops is not None:
            fills = [
                (int(layer), int(device), target - int(filled_LG[layer, device]))
                for layer, device in np.argwhere(filled_LG < target)
            ]
            return target, drops, fills
    raise AssertionError("filling every device like the fullest needs no drop")


def _drops(plan: Plan, filled_LG: npt.NDArray[np.int64], target: int) -> list[Step] | None:
    """Copies to drop so that no device holds more than `target`; None where there are too few."""
    if target * plan.num_devices < plan.num_experts:
        return None
    replicas_LE, copies_LGE = plan.replicas_LE, plan.copies_LGE()
    drops = []
    for layer, device in np.argwhere(filled_LG > target):
        for _ in range(int(filled_LG[layer, device]) - target):
            held_E = copies_LGE[layer, device]
            expert = int(np.where(held_E > 0, replicas_LE[layer], 0).argmax())
            if replicas_LE[layer, expert] < 2:
                return None
            held_E[expert] -= 1
            replicas_LE[layer, expert] -= 1
            drops.append((int(layer), int(device), expert))
    return drops


def _uneven(plan: Plan, filled_LG: npt.NDArray[np.int64], engine: str) -> str:
    sizes, times = np.unique(filled_LG, return_counts=True)
    usual = int(sizes[times.argmax()])
    odd = np.argwhere(filled_LG != usual)
    layer, device = odd[0]
    target, drops, fills = nearest_even(plan)
    todo = []
    if drops:
        first, where, expert = drops[0]
        place = f"device {where} of {layer_name(plan, first)}"
        count = "copy" if len(drops) == 1 else f"{len(drops)} copies, the first"
        todo.append(f"drop the extra {count} (expert {expert}) from {place}")
    if fills:
        first, where, slots = fills[0]
        place = f"{slots} on device {where} of {layer_name(plan, first)}"
        total = sum(fill[2] for fill in fills)
        todo.append(f"fill {total} empty slot{'s' * (total > 1)}, first {place}")
    more = f" ({len(odd) - 1} more such devices and layers)" if len(odd) > 1 else ""
    return (
        f"{engine} needs the same number of filled slots on every device in every layer; device "
        f"{device} of {layer_name(plan, int(layer))} fills {filled_LG[layer, device]}, most fill "
        f"{usual}{more}. Nearest plan: {' and '.join(todo)}; or plan with equal slots: "
        f"--slots-per-device {target}"
    )
