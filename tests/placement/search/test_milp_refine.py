"""Polishing a layer by an integer program: as good as any placement, proved, never worse."""

from __future__ import annotations

import dataclasses
import itertools
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pulp
import pytest

from loadmaster.foundation.arrays import FloatArray
from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.cost.lower_bounds import BoundError, checked_gap
from loadmaster.placement.methods.milp import Solved, SolverError, binary_grid, solve
from loadmaster.placement.plan import DispatchSpec
from loadmaster.placement.planning.planner import PlanResult, plan
from loadmaster.placement.planning_traffic import LayerTraffic
from loadmaster.placement.search import milp_refine as polishing
from loadmaster.placement.search.layer_search import search_layer
from loadmaster.placement.search.layer_task import LayerTask
from loadmaster.placement.search.milp_refine import Polished, polish, search_and_polish
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace

HARDWARE = Cluster.preset("h100", slots_per_device=1).hardware


def task_of(load_WE: FloatArray, slots: list[int], speeds: list[float]) -> LayerTask:
    devices = tuple(
        Device(node=0, slots=n, speed=s) for n, s in zip(slots, speeds, strict=True)
    )
    traffic = LayerTraffic(None, None, (), None, load_WE, load_WE.shape[1])
    return LayerTask(
        layer=0, layers=1, traffic=traffic, slots_G=np.array(slots), capacity_G=None,
        cluster=Cluster(devices=devices, hardware=HARDWARE), dispatch=DispatchSpec(),
        objective="balance", model=None, slack=0.0, seed=0, effort="thorough",
    )


def busiest(load_E: FloatArray, hosts: tuple[int, ...], speeds: list[float]) -> float:
    """Least time of the busiest device when tokens split freely over each expert's hosts (bits).

    The largest, over sets of devices, of the load that has nowhere else to go over their speed.
    """
    return max(
        sum(load for load, mask in zip(load_E, hosts, strict=True) if mask & ~group == 0)
        / sum(s for g, s in enumerate(speeds) if group >> g & 1)
        for group in range(1, 2 ** len(speeds))
    )


def best_of_all(load_WE: FloatArray, slots: list[int], speeds: list[float]) -> float:
    """Mean over steps of the busiest device, perfect balance 1, by trying every placement."""
    ideal_W = load_WE.sum(axis=1) / sum(speeds)
    best = np.inf
    for hosts in itertools.product(range(1, 2 ** len(slots)), repeat=load_WE.shape[1]):
        held = [sum(mask >> g & 1 for mask in hosts) for g in range(len(slots))]
        if all(n <= most for n, most in zip(held, slots, strict=True)):
            reached = [busiest(row, hosts, speeds) for row in load_WE]
            best = min(best, float(np.mean(np.array(reached) / ideal_W)))
    return best


@pytest.mark.parametrize(("slots", "speeds"), [
    ([2, 2], [1.0, 1.0]), ([3, 2], [1.0, 1.0]), ([2, 3], [1.0, 2.0]), ([2, 2, 1], [1.0] * 3),
])
@pytest.mark.parametrize("seed", range(3))
def test_no_placement_at_all_is_better(slots: list[int], speeds: list[float], seed: int) -> None:
    load_WE = np.random.default_rng(seed).integers(0, 50, (3, 4)).astype(float) + 1
    start = np.full((len(slots), max(slots)), -1, np.int16)
    experts = iter([0, 1, 2, 3])
    for g, n in enumerate(slots):
        for c in range(n):
            start[g, c] = next(experts, -1)
    found = polish(load_WE, task_of(load_WE, slots, speeds), start, nodes=10_000)
    hosts = tuple(
        sum(1 << g for g, row in enumerate(found.slots_GC) if e in row) for e in range(4)
    )
    ideal_W = load_WE.sum(axis=1) / sum(speeds)
    reached = float(np.mean(
        [busiest(row, hosts, speeds) / i for row, i in zip(load_WE, ideal_W, strict=True)]
    ))
    wanted = best_of_all(load_WE, slots, speeds)
    assert found.solved.proved
    assert reached == pytest.approx(wanted, abs=1e-5)
    assert found.solved.bound == pytest.approx(wanted, abs=1e-5)
    assert ((found.slots_GC >= 0).sum(axis=1) <= slots).all()


# ---- through plan() ---------------------------------------------------------------------------


def quick(effort: str, seed: int = 0, **asked: Any) -> PlanResult:
    trace = synth_trace(
        layers=1, experts=6, top_k=2, tokens=4000, request_tokens=50, seed=seed, zipf=0.8
    )
    cluster = Cluster.preset("h100", devices_per_node=3, slots_per_device=2)
    steps = StepSampler(tokens=60, concurrency=8)
    return plan(trace, cluster, effort=effort, **({"steps": steps} | asked))


@pytest.mark.parametrize("seed", range(3))
def test_thorough_proves_what_the_search_found_on_small_layers(seed: int) -> None:
    normal, thorough = quick("normal", seed), quick("thorough", seed)
    assert normal.evidence.gap > 0.02                     # the load bound alone says little here
    assert thorough.evidence.gap < 1e-3
    assert thorough.evidence.bound <= thorough.evidence.objective
    assert thorough.evidence.validation is not None and normal.evidence.validation is not None
    assert thorough.evidence.validation <= normal.evidence.validation + 1e-3
    checked_gap(normal.evidence.objective, thorough.evidence.bound, "the same steps")


def test_thorough_is_as_repeatable_as_the_rest() -> None:
    assert quick("thorough").plan.to_json() == quick("thorough").plan.to_json()


@pytest.mark.parametrize("asked", [{"dispatch": "even"}, {"dispatch": "nearest"}])
def test_dispatch_that_does_not_split_freely_is_not_polished(asked: dict[str, Any]) -> None:
    result = quick("thorough", **asked)
    assert (result.plan.replicas_LE >= 1).all()
    assert result.evidence.bound <= result.evidence.objective


# ---- guards -----------------------------------------------------------------------------------


def gapped_task(**asked: Any) -> LayerTask:
    """A layer whose load bound is far below what any placement reaches."""
    load_WE = np.random.default_rng(3).integers(1, 50, (4, 6)).astype(float)
    return dataclasses.replace(task_of(load_WE, [2, 2, 2], [1.0, 1.0, 1.0]), **asked)


def patched(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """`answer(start_GC)` in place of the solver."""
    monkeypatch.setattr(
        polishing, "polish", lambda load_WE, task, start_GC, **_: answer(start_GC)
    )


def nothing_found(_start_GC: Any) -> Polished:
    raise SolverError("HiGHS found no answer")


def test_a_guard_that_fires_before_the_solver_has_an_answer_keeps_the_searchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patched(monkeypatch, nothing_found)
    searched = search_layer(gapped_task())
    kept = search_and_polish(gapped_task(deadline=time.time() + 600))
    assert kept.truncated and kept.slots_GC.tolist() == searched.slots_GC.tolist()
    with pytest.raises(SolverError):              # without a time limit nothing may stop it
        search_and_polish(gapped_task())


def test_a_guard_that_fires_while_polishing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = time.time() + 600
    task = gapped_task(deadline=deadline)

    def too_late(start_GC: Any) -> Polished:
        monkeypatch.setattr(time, "time", lambda: deadline + 1)
        return Polished(start_GC, Solved(2.0, -np.inf, np.inf, proved=False))

    patched(monkeypatch, too_late)
    assert search_and_polish(task).truncated


def test_a_bound_above_what_was_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, lambda start_GC: Polished(start_GC, Solved(9.0, 9.0, 0.0, proved=True)))
    with pytest.raises(BoundError, match="layer 0, polished"):
        search_and_polish(gapped_task())


def test_a_solver_that_bounds_its_own_answer_from_above_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = pulp.LpProblem("two", pulp.LpMinimize)
    x = binary_grid("x", 1, 2)[0]
    problem += 3 * x[0] + 2 * x[1]
    problem += x[0] + x[1] >= 1
    assert solve(problem, nodes=10).bound == pytest.approx(2.0)
    real = pulp.LpProblem.solve

    def lying(self: pulp.LpProblem, solver: Any) -> None:
        real(self, solver)
        said = SimpleNamespace(
            primal_solution_status=2, objective_function_value=2.0, mip_dual_bound=2.1, mip_gap=0.0
        )
        self.solverModel = SimpleNamespace(getInfo=lambda: said, getModelStatus=lambda: None)

    monkeypatch.setattr(pulp.LpProblem, "solve", lying)
    with pytest.raises(BoundError, match="the program 'two'"):
        solve(problem, nodes=10)


def test_who_waits_hears_of_the_gap() -> None:
    heard: list[tuple[float, float]] = []
    answer = search_and_polish(gapped_task(), lambda reached, bound: heard.append((reached, bound)))
    assert heard and all(bound <= reached + 1e-6 for reached, bound in heard)
    assert not answer.truncated


def test_a_program_of_one_share_of_the_memory_bounds_no_other() -> None:
    """Of 2 slots in this layer the polished bound knows; another share-out may give it 3."""
    load_WE = np.random.default_rng(3).integers(1, 50, (4, 6)).astype(float)
    roomy = task_of(load_WE, [3, 3, 3], [1.0, 1.0, 1.0])
    tight = dataclasses.replace(roomy, slots_G=np.array([2, 2, 2]))
    best_roomy = search_and_polish(roomy).planning.peak
    assert search_and_polish(tight).bound <= best_roomy + 1e-9
