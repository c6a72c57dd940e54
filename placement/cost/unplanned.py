"""The model's MoE layers that a trace, and so a plan, does not hold: what they cost.

They keep the layout that engines start with, and are taken to route like the mean of the layers
that were recorded. Knows plans, steps and models. Knows nothing of search or files.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...errors import InputError
from ...foundation.arrays import FloatArray, SlotArray
from ...foundation.parallel import Executor
from ...traces.model_config.layer_ranges import written
from ...traces.model_layers import layers_in_model, missing_layers
from ...traces.model_spec import ModelSpec
from ...traces.steps import Steps
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..plan import DispatchSpec, Plan
from .overlap import Overlap
from .step_cost import step_cost
from .step_loads import step_loads

UNPLANNED_PRICED = (
    "step time counts each of the model's layers that the plan does not hold as the mean layer "
    "under the engines' default layout"
)


def default_slots_GC(num_experts: int, devices: int, slots: int) -> SlotArray:
    """[G, C] the layout engines start with: expert s mod E in slot s, slots counted over devices.
    """
    filled = np.arange(devices * slots) % num_experts
    return filled.reshape(devices, slots).astype(np.int16)


def unplanned_layers(model: ModelSpec | None, layers: tuple[int, ...], experts: int, what: str
                     ) -> tuple[int, ...]:
    """The model's layers that `what`, with these layers, lacks; none without a model.

    Raises InputError where it is not of that model.
    """
    if model is None:
        return ()
    unnumbered = model.layer_indices is None and model.num_layers != len(layers)
    if model.num_experts != experts or unnumbered:
        raise InputError(
            f"the model {model.name} has {model.num_layers} MoE layers of {model.num_experts} "
            f"experts, {what} {len(layers)} of {experts}: they do not belong together"
        )
    try:
        return missing_layers(model, layers)
    except InputError as error:
        raise InputError(f"{what}'s {error.typed}") from None


def unplanned_us_W(
    trace: RoutingTrace, steps: Steps, shape_LGC: tuple[int, int, int], cluster: Cluster,
    dispatch: DispatchSpec, model: ModelSpec, overlap: Overlap | None = None,
    executor: Executor | None = None,
) -> FloatArray | None:
    """[W] what all unplanned layers add to each step; None where there are none, or no sizes.

    Each is the mean over the trace's layers under the default layout, with the plan's slots.
    """
    count = len(missing_layers(model, trace.layer_indices))
    if not count or not model.knows_sizes:
        return None
    layers, devices, slots = shape_LGC
    default = Plan(
        slots=np.tile(default_slots_GC(trace.num_experts, devices, slots), (layers, 1, 1)),
        num_experts=trace.num_experts, layer_indices=trace.layer_indices, dispatch=dispatch,
    )
    loads = step_loads(
        trace, steps, default, cluster, dispatch, expert_bytes_E=model.listed_bytes_E(),
        executor=executor, timed=True,
    )
    alone = model.model_copy(update={"other_time_us": 0.0})
    cost = step_cost(loads, alone, cluster, dispatch=dispatch, overlap=overlap)
    mean_W: FloatArray = cost.layer_us_WL.mean(axis=1) * count
    return mean_W


def unplanned_note(missing: tuple[int, ...], planned: int, *, timed: bool) -> tuple[str, ...]:
    """What became of the layers that were not recorded."""
    if not missing:
        return ()
    priced = "; step time counts each as the mean recorded layer under it" if timed else ""
    return (
        f"the trace lacks {len(missing)} of the model's {planned + len(missing)} MoE layers "
        f"({written(missing)}): they keep the engines' default layout, and `plan-export --model` "
        f"writes it{priced}",
    )


def completed(plan: Plan, model: ModelSpec) -> Plan:
    """The plan with every MoE layer of the model: those it lacks in the default layout.

    Raises InputError where it is another model's.
    """
    missing = unplanned_layers(model, layers_of(plan), plan.num_experts, "the plan")
    if not missing:
        return plan
    own = layers_in_model(model, layers_of(plan))
    filled = filled_shape(plan)[2]
    default = np.full((plan.num_devices, plan.slots_per_device), -1, np.int16)
    default[:, :filled] = default_slots_GC(plan.num_experts, plan.num_devices, filled)
    by_layer = dict(zip(own, plan.slots, strict=True)) | dict.fromkeys(missing, default)
    layers = tuple(sorted(by_layer))
    return replace(
        plan, slots=np.stack([by_layer[layer] for layer in layers]), layer_indices=layers,
        evidence=None,
    )


def layers_of(plan: Plan) -> tuple[int, ...]:
    """The plan's layer numbers; counted from 0 where it has none."""
    return plan.layer_indices or tuple(range(plan.num_layers))


def filled_shape(plan: Plan) -> tuple[int, int, int]:
    """(layers, devices, the most slots that a device fills in a layer)."""
    return plan.num_layers, plan.num_devices, int((plan.slots >= 0).sum(axis=2).max())
