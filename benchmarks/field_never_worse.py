"""Whether `auto` loses to a method it knows: a section of the field's benchmark.

never_worse   60 random instances (routing with domains, clustered or skewed; 2 to 6 devices in 1 to
              3 nodes, some uneven; every traffic mode; traces too short to hold anything back, and
              average loads), each under every dispatch and objective: `auto` against every other
              method, on the steps that `auto` judges by.

`auto` loses where another method's plan is better by more than a tie (`TIE`), as the objective
compares plans: less time; a lower peak; where transfers cost bytes, also a peak as good with fewer
transfers. There `auto` may spend `balance_slack` of the peak on fewer transfers, and does not lose
by it. A plan with an expert twice on a device is none for vllm-ascend, and not compared there.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadmaster.errors import InfeasibleError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.policies import POLICIES
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.linked_layers import scored_together, together, whole_score
from loadmaster.placement.planning.planner import (
    METHODS,
    capacity_of_layers,
    layer_tasks,
    most_steps,
    plan,
    resolve_settings,
)
from loadmaster.placement.planning_traffic import planning_steps
from loadmaster.placement.search.layer_task import Score, answer_with, judged
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace

INSTANCES, SEED = 60, 15
TRAFFIC = (
    "return_home/per_expert", "return_home/per_rank", "return_home/per_node", "allgather",
    "coherent",
)
TIE = 1e-4      # of the least objective; fewer transfers: per token
OTHERS = tuple(method for method in METHODS if method != "auto")


@dataclass(frozen=True)
class Instance:
    """One thing to plan."""

    name: str
    source: RoutingTrace | Profile
    cluster: Cluster
    model: ModelSpec
    steps: StepSampler

    @classmethod
    def draw(cls, number: int) -> Instance:
        rng = np.random.default_rng([SEED, number])
        nodes, each = [(1, 2), (1, 4), (2, 2), (3, 2), (1, 3), (2, 1)][number % 6]
        devices, layers = nodes * each, 1 + number // 6 % 2
        experts = int(rng.integers(devices, 17))
        top_k = int(rng.integers(1, min(4, experts) + 1))
        width = -(-experts // devices) + int(rng.integers(0, 3))
        traffic = TRAFFIC[number // 12 % len(TRAFFIC)]
        speeds = rng.choice([0.5, 1.0], devices).tolist() if rng.random() < 0.15 else None
        clustered = bool(rng.random() < 0.5)
        short = rng.random() < 0.15
        trace = synth_trace(
            layers=layers, experts=experts, top_k=top_k, tokens=300 if short else 1_500,
            zipf=float(rng.uniform(0.0, 1.2)), request_tokens=40, domains=int(rng.integers(1, 4)),
            block_share=0.9 if clustered else 0.2, seed=number,
        )
        loads = rng.random() < 0.15
        return cls(
            f"{number}: {experts} experts, top {top_k}, {nodes}x{each}x{width}, {traffic}"
            f"{', clustered' if clustered else ''}{', uneven' if speeds else ''}"
            f"{', average loads' if loads else ', short' if short else ''}",
            Profile.from_loads(trace.load_LE()) if loads else trace,
            Cluster.preset(
                "h100", nodes=nodes, devices_per_node=each, slots_per_device=width,
                traffic=traffic, speeds=speeds,
            ),
            ModelSpec(
                name="drawn", num_layers=layers, num_experts=experts, top_k=top_k,
                hidden=int(rng.choice([256, 2048])), intermediate=int(rng.choice([256, 2048])),
            ),
            StepSampler(tokens=int(rng.choice([32, 128])), concurrency=8, seed=number),
        )


def never_worse(instances: int = INSTANCES) -> dict[str, Any]:
    """The section's figures."""
    asked = compared = 0
    lost: list[dict[str, Any]] = []
    by_method: Counter[str] = Counter()
    for number in range(instances):
        instance = Instance.draw(number)
        print(f"  {instance.name}", file=sys.stderr, flush=True)
        for objective in ("balance", "time"):
            if objective == "time" and isinstance(instance.source, Profile):
                continue
            for dispatch in POLICIES:
                asked += 1
                for method, worse in losses(instance, dispatch, objective):
                    compared += 1
                    if worse:
                        by_method[method] += 1
                        lost.append({
                            "instance": instance.name, "dispatch": dispatch,
                            "objective": objective, "method": method, **worse,
                        })
    return {
        "holds": not lost, "instances": instances, "asked": asked, "compared": compared,
        "lost": len(lost), "to": dict(by_method), "worst": lost[:20],
        "target": "auto at least as good as every other method, on the steps it judges by",
    }


def losses(instance: Instance, dispatch: str, objective: str) -> Any:
    """(method, what it is better in; {} = nothing) of every method that can plan this."""
    asked: dict[str, Any] = {
        "objective": objective, "dispatch": dispatch, "steps": instance.steps, "effort": "fast",
        "model": instance.model if objective == "time" else None,
    }
    made = {"auto": plan(instance.source, instance.cluster, **asked).plan}
    for method in OTHERS:
        try:
            made[method] = plan(instance.source, instance.cluster, method=method, **asked).plan
        except (InfeasibleError, UsageError):
            continue         # a method that wants equal devices, or tokens
    judge = Judge(instance, objective, dispatch)
    auto = judge.scores(made["auto"])
    for method in OTHERS:
        held = made.get(method)
        if held is not None and not (dispatch == "ascend_fixed" and held.duplicates):
            yield method, judge.better(judge.scores(held), auto)


class Judge:
    """The steps and the objective by which `auto` chooses, of one instance."""

    def __init__(self, instance: Instance, objective: str, dispatch: str) -> None:
        model = instance.model if objective == "time" else None
        self.settings = resolve_settings(
            instance.cluster, "auto", objective, dispatch, model, None, 0, "fast", None
        )
        self.data = planning_steps(
            instance.source, instance.steps, most_steps=most_steps(self.settings)
        )
        capacities = capacity_of_layers(self.data, self.settings)
        self.tasks = list(layer_tasks(self.data, self.settings, capacities))

    def scores(self, made: Plan) -> list[Score]:
        """Of every layer, or of the whole plan where layers are linked."""
        candidates = [
            judged(task, "", slots_GC)
            for task, slots_GC in zip(self.tasks, made.slots, strict=True)
        ]
        if not scored_together(self.settings):
            return [candidate.decisive for candidate in candidates]
        answers = [
            answer_with(task, candidate)
            for task, candidate in zip(self.tasks, candidates, strict=True)
        ]
        return [whole_score(together(answers, self.data, self.settings), self.settings.objective)]

    def better(self, other: list[Score], auto: list[Score]) -> dict[str, Any]:
        """What the other plan is better in than `auto`'s; {} = nothing."""
        if self.settings.objective == "time":
            return _less("time_us", [s.time_us for s in other], [s.time_us for s in auto], 0.0)
        slack = self.settings.slack if self.tasks[0].counts_transfers else 0.0
        for mine, theirs in zip(auto, other, strict=True):
            found = _less("peak", [theirs.peak], [mine.peak], slack)
            if not found and slack and theirs.peak <= mine.peak:
                less = mine.transfers - theirs.transfers
                if less > TIE:
                    found = {"transfers": [theirs.transfers, mine.transfers]}
            if found:
                return found
        return {}


def _less(what: str, other: Any, auto: Any, slack: float) -> dict[str, Any]:
    theirs, mine = float(np.sum(other)), float(np.sum(auto))
    return {what: [theirs, mine]} if theirs * (1 + TIE) + slack < mine else {}
