"""Compile what serving and planning compile, once, so that the first run of anything is quick.

`make` runs it after installing: `python -m loadmaster.workers.warm_up`. Ranks compile the same
functions; without it, all of them would do so at the same time. Compiled code is kept next to the
modules, for every process to load. Prints nothing but errors.
"""

from __future__ import annotations

import tempfile

import numpy as np

from ..placement.cluster import Cluster
from ..placement.cost.evaluate import evaluate
from ..placement.planning.planner import plan
from ..traces.model_spec import ModelSpec
from ..traces.steps import StepSampler
from ..traces.synth.generate import synth_trace
from .coordinator.coordinator import Coordinator
from .fleet.thread_fleet import ThreadFleet
from .group.group import contiguous
from .protocol.phase_plans import PhasePlans
from .protocol.settings import GroupSettings, RankSettings, served_spec
from .reference import reference_model_dir


def warm_up() -> None:
    """A prompt served by two ranks that are threads; a small plan made for either objective."""
    _serve()
    _plan()


def _serve(ranks: int = 2) -> None:
    directory = str(reference_model_dir())
    spec = served_spec(directory, "bfloat16")
    made = contiguous(spec, ranks)
    cluster = Cluster.preset(
        "cpu", devices_per_node=ranks, slots_per_device=made.slots_per_device,
        traffic="return_home/per_rank",      # dispatch per expert is compiled by `_plan`
    )
    with tempfile.TemporaryDirectory(prefix="loadmaster-") as folder:
        settings = GroupSettings(
            name="warm-up", journal=f"{folder}/journal", plans=PhasePlans.both(made),
            ranks=tuple(RankSettings(g, ranks, directory, cluster) for g in range(ranks)),
            model_spec=spec,
        )
        coordinator = Coordinator(settings, ThreadFleet())
        coordinator.start()
        try:
            prompts = [np.arange(64, dtype=np.int32)] * ranks
            coordinator.wait_all(coordinator.submit(prompts, 2), 600.0)
        finally:
            coordinator.stop()


def _plan() -> None:
    trace = synth_trace(layers=1, experts=8, top_k=2, tokens=4000, request_tokens=50)
    cluster = Cluster.preset("cpu", devices_per_node=4, slots_per_device=3)
    steps = StepSampler(tokens=64, concurrency=8)
    model = ModelSpec(
        num_layers=1, num_experts=8, top_k=2, hidden=128, intermediate=48, name="warm-up"
    )
    for objective, spec in (("balance", None), ("time", model)):
        made = plan(
            trace, cluster, steps=steps, effort="fast", objective=objective, model=spec
        ).plan
        evaluate(made, trace, cluster, steps=steps, model=spec)


if __name__ == "__main__":
    warm_up()
