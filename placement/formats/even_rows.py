"""A plan as rows of equal slots, or a refusal that names the nearest plan that is.

What SGLang, TensorRT-LLM, vllm-ascend and EPLB share: S slots per layer, slot s on device
s // (S / G), every slot filled, every layer with as many. Knows nothing of their files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..plan import Plan
from .nearest import closed_up, even_steps

_NEAREST = "--nearest writes that"


def even_rows_LS(plan: Plan, engine: str) -> npt.NDArray[np.int64]:
    """[L, S] experts of all slots, holes closed up, order kept.

    Raises InputError where devices or layers fill different numbers of slots: names the first odd
    one and the nearest plan without.
    """
    filled_LG = (plan.slots >= 0).sum(axis=2)
    if filled_LG.min() != filled_LG.max():
        raise _uneven(plan, filled_LG, engine)
    packed = closed_up(plan.slots.astype(np.int64))[:, :, : int(filled_LG[0, 0])]
    return packed.reshape(plan.num_layers, -1)


def refuse_duplicates(plan: Plan, engine: str, why: str) -> None:
    """Raises InputError naming the first device that holds an expert twice."""
    twice = np.argwhere(plan.replicas_LGE() > 1)
    if not len(twice):
        return
    layer, device, expert = (int(i) for i in twice[0])
    more = f" ({plan.duplicates - 1} more such replicas)" if plan.duplicates > 1 else ""
    raise InputError(
        f"{engine} cannot hold an expert twice on one device: {why}; device {device} of "
        f"{layer_name(plan, layer)} holds expert {expert} twice{more}. Nearest plan: leave out "
        f"the second replica, or another expert in its place: {_NEAREST}"
    )


def layer_name(plan: Plan, layer: int) -> str:
    """How messages name a layer: by the model's own number where the plan has it."""
    if plan.layer_indices:
        return f"layer {plan.layer_indices[layer]}"
    return f"MoE layer {layer}"


def _uneven(plan: Plan, filled_LG: npt.NDArray[np.int64], engine: str) -> InputError:
    sizes, times = np.unique(filled_LG, return_counts=True)
    usual = int(sizes[times.argmax()])
    odd = np.argwhere(filled_LG != usual)
    layer, device = (int(i) for i in odd[0])
    more = f" ({len(odd) - 1} more such places)" if len(odd) > 1 else ""
    target, drops, fills = even_steps(plan.slots.astype(np.int64), plan.num_experts)
    steps = []
    if drops:
        first, where, expert = drops[0]
        place = f"expert {expert} from device {where} of {layer_name(plan, first)}"
        rest = f" and {len(drops) - 1} more extra replicas" if len(drops) > 1 else ""
        steps.append(f"drop {place}{rest}")
    if fills:
        first, where, count = fills[0]
        total = sum(fill[2] for fill in fills)
        place = f"device {where} of {layer_name(plan, first)}"
        rest = f" and {total - count} elsewhere" if total > count else ""
        steps.append(f"fill {count} more slot{'s' * (count > 1)} of {place}{rest}")
    return InputError(
        f"{engine} needs the same number of filled slots on every device in every layer; device "
        f"{device} of {layer_name(plan, layer)} fills {filled_LG[layer, device]}, most fill "
        f"{usual}{more}. Nearest plan ({target} each): {', '.join(steps)}: {_NEAREST}, or plan "
        f"with --slots-per-device {target}"
    )
