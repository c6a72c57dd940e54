"""Real processes dying under a real group: SIGKILL, SIGSTOP, and the coordinator's own death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loadmaster.workers.group.group import Group

pytestmark = pytest.mark.slow

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def group(ray_cluster: None, checkpoint: Make) -> Iterator[Group]:
    name = f"faults-{os.getpid()}"
    started = Group.start(checkpoint("qwen3_moe"), ranks=3, name=name, cpus_per_rank=0.1)
    yield started
    started.stop()


@pytest.fixture
def load(group: Group, random_prompts: Make) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and their undisturbed continuations; runs enough steps to know the pace."""
    prompts = random_prompts(31, 6)
    return prompts, group.generate(prompts, 60)


def recoveries(group: Group) -> list[Any]:
    found: list[Any] = group.status()["recoveries"]
    return found


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_costs_no_request_and_no_token(
    group: Group, load: Any, signal_number: int
) -> None:
    prompts, want = load
    before = len(recoveries(group))
    streams = [group.submit(p, 60) for p in prompts]
    next(iter(streams[0]))
    victim = group.status()["pids"][1]
    os.kill(victim, signal_number)
    began = time.monotonic()
    assert [s.result() for s in streams] == want
    assert time.monotonic() - began < 60.0
    after = recoveries(group)
    assert len(after) == before + 1
    assert after[-1].replaced == (1,)
    assert victim not in group.status()["pids"]
    assert not os.path.exists(f"/proc/{victim}") or _is_zombie(victim)


def test_a_dead_coordinator_is_followed_by_another(
    group: Group, load: Any, shuffled_plan: Make
) -> None:
    import ray

    prompts, want = load
    group.apply(shuffled_plan(group.model_spec, 5, ranks=3))
    epoch, plan, ranks = group.epoch, group.plan, group.status()["pids"]
    streams = [group.submit(p, 60) for p in prompts]
    next(iter(streams[0]))
    actor = group._line._actor
    (pid,) = ray.get([actor.__ray_call__.remote(lambda self: os.getpid())])
    os.kill(pid, signal.SIGKILL)
    assert [s.result() for s in streams] == want
    assert (group.epoch, group.status()["pids"]) == (epoch, ranks)
    assert group.plan.same_slots(plan)


def _is_zombie(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"
