"""Whole plans of other methods: the plan that was asked for, or candidates for `auto`.

Methods that place all layers together run here. Knows the methods and what they cost. Knows nothing
of search or evidence.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import InfeasibleError, UsageError
from ...foundation.arrays import SlotArray
from ..cost.token_transfers import transfers_cost_bytes
from ..methods.affinity import affinity
from ..methods.moetuner import moetuner
from ..methods.whole_model import Method, PlacedModel, pairs_fit, whole_model
from ..planning_traffic import PlanningSteps
from .evidence import Settings

WHOLE_MODEL_METHODS: dict[str, Method] = {"affinity": affinity, "moetuner": moetuner}
SMALL = 128          # experts · devices of a layer up to which any method costs next to nothing

Progress = Callable[[int, int, float], None]     # layers done, layers, gap so far


def place_model(
    method: str, data: PlanningSteps, settings: Settings, progress: Progress | None = None
) -> PlacedModel:
    """All layers by a method that places them together."""
    model = whole_model(
        data, settings.cluster, method, settings.seed, settings.effort, settings.deadline
    )

    def done(layers: int, gap: float) -> None:
        if progress is not None:
            progress(layers, data.num_layers, gap)

    return WHOLE_MODEL_METHODS[method](model, done)


def known_plans(data: PlanningSteps, settings: Settings) -> dict[str, SlotArray]:
    """[L, G, C] by method, where one may beat a search layer by layer and costs less than it.

    Whose experts follow each other on a device saves transfers where a token is sent once, or
    stays. Where neither matters a small layer's search may still lose by the luck of a few steps;
    a large one's does not, against one replica of each expert placed by average loads or without.
    Under a time limit none: it is for the search.
    """
    if data.trace is None or settings.deadline is not None or not pairs_fit(data):
        return {}
    cluster = settings.cluster
    chain = cluster.traffic.mode == "coherent"
    small = data.num_experts * cluster.num_devices <= SMALL
    wanted = ["affinity"] * (chain or small or transfers_cost_bytes(cluster))
    wanted += ["moetuner"] * (small or (chain and settings.objective == "time"))
    found = {}
    for method in wanted:
        try:
            found[method] = place_model(method, data, settings).slots_LGC
        except (InfeasibleError, UsageError):      # it wants equal devices
            continue
    return found
