"""Tiny random checkpoints, groups of threads, and one Ray cluster for all that need it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Before anything imports ray: a token of our own, so that no file of the user's is written.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from benchmarks.random_checkpoint import save_random_checkpoint
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.token_limit import CapacityRule
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.fleet.thread_fleet import ThreadFleet
from loadmaster.workers.group.group import contiguous
from loadmaster.workers.protocol.phase_plans import PhasePlans
from loadmaster.workers.protocol.settings import GroupSettings, Limits, RankSettings, served_spec

RANKS = 4


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """architecture -> a tiny random checkpoint of it (made once)."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            directory = tmp_path_factory.mktemp(architecture)
            made[architecture] = save_random_checkpoint(architecture, directory)
        return made[architecture]

    return get


@pytest.fixture
def single_thread() -> Iterator[None]:
    """One torch thread, as in every rank."""
    with one_thread():
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def start_threads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Coordinator]]:
    """Start groups whose ranks are threads of this process; they end with the test."""
    with groups_of_threads(tmp_path_factory) as start:
        yield start


@contextmanager
def groups_of_threads(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Coordinator]]:
    """`start_threads` for a fixture that outlives a test."""
    started: list[Coordinator] = []

    def start(
        model_dir: Path,
        plan: Plan | None = None,
        *,
        dtype: str = "bfloat16",
        payload: str = "per_expert",
        limits: Limits | None = None,
        record_to: Path | None = None,
        stage_budget_bytes: int = 4 << 20,
        fleet: ThreadFleet | None = None,
        capacity: CapacityRule | None = None,
        step_timeout_s: float = 30.0,
        device: str = "cpu",
        ranks: int = RANKS,
        **settings_too: Any,
    ) -> Coordinator:
        spec = served_spec(model_dir, dtype)
        plan = plan or contiguous(spec, ranks)
        cluster = Cluster.preset(
            "cpu", devices_per_node=ranks, slots_per_device=plan.slots_per_device,
            traffic=f"return_home/{payload}",
        )
        target = None if record_to is None else str(record_to)
        settings = GroupSettings(
            name="threads",
            ranks=tuple(
                RankSettings(
                    g, ranks, str(model_dir), cluster, dtype, target, capacity=capacity,
                    device=device,
                )
                for g in range(ranks)
            ),
            plans=PhasePlans.both(plan),
            model_spec=spec,
            journal=str(tmp_path_factory.mktemp("journal")),
            limits=limits or Limits(step_tokens=64, chunk_tokens=32),
            step_timeout_s=step_timeout_s,
            stage_budget_bytes=stage_budget_bytes,
            **settings_too,
        )
        coordinator = Coordinator(settings, fleet or ThreadFleet())
        coordinator.start()
        started.append(coordinator)
        return coordinator

    with one_thread():
        try:
            yield start
        finally:
            for coordinator in started:
                coordinator.stop()


@pytest.fixture(scope="session")
def shuffled_plan() -> Callable[..., Plan]:
    """(spec, seed) -> a plan with experts at random over the ranks and replicas on each."""

    def make(
        spec: ModelSpec,
        seed: int,
        *,
        spare: int = 1,
        ranks: int = RANKS,
        dispatch: str = "balanced",
    ) -> Plan:
        rng = np.random.default_rng(seed)
        base = -(-spec.num_experts // ranks)
        slots = np.full((spec.num_layers, ranks, base + spare), -1, np.int16)
        for layer in range(spec.num_layers):
            for rank, part in enumerate(np.array_split(rng.permutation(spec.num_experts), ranks)):
                others = np.setdiff1d(np.arange(spec.num_experts), part)
                row = np.concatenate((part, rng.choice(others, spare, replace=False)))
                slots[layer, rank, : len(row)] = row
        return Plan(
            slots=slots, num_experts=spec.num_experts, dispatch=DispatchSpec(policy=dispatch)
        )

    return make


@pytest.fixture(scope="session")
def random_prompts() -> Callable[..., list[list[int]]]:
    """(seed, count, longest) -> prompts of different lengths."""

    def make(seed: int, count: int, longest: int = 60) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, longest, count)
        return [rng.integers(0, 256, int(n)).tolist() for n in lengths]

    return make


@pytest.fixture(scope="session")
def serve() -> Callable[..., list[tuple[tuple[int, ...], str]]]:
    """(coordinator, prompts, new tokens) -> (tokens, digest) of each; fails on a failed request."""

    def run(
        coordinator: Coordinator, prompts: list[list[int]], new_tokens: int = 1
    ) -> list[tuple[tuple[int, ...], str]]:
        numbers = coordinator.submit(prompts, new_tokens)
        states = coordinator.wait_all(numbers, 60.0)
        assert [s.error for s in states] == [""] * len(states)
        assert all(s.done for s in states)
        coordinator.forget(numbers)
        return [(s.tokens, s.digest) for s in states]

    return run


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for all tests that need it; ended by its handle."""
    import ray

    from loadmaster.workers.fleet.ray_fleet import connect

    connect(num_cpus=4)
    yield
    ray.shutdown()
