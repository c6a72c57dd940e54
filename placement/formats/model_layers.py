"""Which of the model's own layers a plan's layers are.

A trace that does not know numbers its layers 0, 1, 2, ..., so that count alone proves nothing.
"""

from __future__ import annotations

from ...errors import InputError
from ...traces.model_spec import ModelSpec
from ..plan import Plan


def told_layers(plan: Plan) -> tuple[int, ...]:
    """The plan's layer numbers; () where they merely count up from 0."""
    return () if plan.layer_indices == tuple(range(plan.num_layers)) else plan.layer_indices


def model_layers(plan: Plan, model: ModelSpec | None) -> tuple[tuple[int, ...] | None, list[str]]:
    """(the model's own index of every layer, notes); None where neither plan nor model tells.

    Raises InputError where both tell and differ.
    """
    told = told_layers(plan)
    if model is None:
        return told or None, []
    if not told or model.layer_indices is None:
        layers = told or model.own_layer_indices()
        moved = not told and layers != tuple(range(plan.num_layers))
        return layers, (
            [f"layers are taken to be the model's MoE layers, {layers[0]} to {layers[-1]}"]
            if moved else []
        )
    if told != model.layer_indices:
        raise InputError(
            f"the plan is for layers {told[0]}..{told[-1]}, the model's MoE layers are "
            f"{model.layer_indices[0]}..{model.layer_indices[-1]}: it belongs to another model"
        )
    return told, []
