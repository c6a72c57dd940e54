"""Groups on Ray: found by name, serving, switching, and leaving nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from loadmaster.errors import InputError, LoadmasterError, UsageError
from loadmaster.placement.plan import Plan
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.fleet.ray_fleet import NAMESPACE, connect
from loadmaster.workers.group.group import Group

Make = Callable[..., Any]
# Of this process alone: a machine has one group of a name.
PAIR, BROKEN = (f"{name}-{os.getpid()}" for name in ("pair", "broken"))


def actors(name: str) -> set[str]:
    """Names of the live actors of a group."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    mine = {a["name"] for a in listed if a["namespace"] == NAMESPACE}
    return {n for n in mine if n == name or n.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def group(ray_cluster: None, checkpoint: Make) -> Iterator[Group]:
    """Two ranks serving a tiny random model."""
    started = Group.start(checkpoint("qwen3_moe"), ranks=2, name=PAIR, cpus_per_rank=0.1)
    yield started
    started.stop()


def test_a_group_serves_and_switches_like_threads_do(
    group: Group, start_threads: Callable[..., Coordinator], checkpoint: Make,
    shuffled_plan: Make, random_prompts: Make, serve: Make,
) -> None:
    prompts = random_prompts(11, 4)
    threads = start_threads(checkpoint("qwen3_moe"))
    want = [list(tokens) for tokens, _ in serve(threads, prompts, 5)]
    assert group.generate(prompts, 5) == want
    digest = group.prefill(prompts).digest
    before, epoch = group.plan, group.epoch
    target: Plan = shuffled_plan(group.model_spec, 2, ranks=2)
    report = group.apply(target)
    assert [list(m) for m in report.moved] == [list(m) for m in before.moves_to(target)]
    assert group.epoch == epoch + 1
    assert group.plan.same_slots(target)
    assert group.generate(prompts, 5) == want
    assert group.prefill(prompts).digest == digest


def test_tokens_stream_as_they_come(group: Group) -> None:
    stream = group.submit([5, 6, 7], max_new_tokens=6)
    first = next(iter(stream))
    assert [first, *stream] == group.generate([[5, 6, 7]], 6)[0]


def test_a_group_is_found_by_its_name(group: Group) -> None:
    again = Group.find(PAIR)
    assert again.epoch == group.epoch
    with pytest.raises(UsageError, match="no group named 'nobody' is running"):
        Group.find("nobody")


def test_a_name_in_use_is_refused(group: Group, checkpoint: Make) -> None:
    with pytest.raises(UsageError, match=f"'{PAIR}' is running"):
        Group.start(checkpoint("qwen3_moe"), ranks=2, name=PAIR)


@pytest.mark.parametrize(("gpus", "reason"), [(1.0, "the Ray cluster has"), (2.0, r"\[0, 1\]")])
@pytest.mark.skipif(torch.cuda.device_count() >= 8, reason="there are as many GPUs")
def test_gpus_that_are_not_there_are_refused_at_once(
    group: Group, checkpoint: Make, gpus: float, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        Group.start(checkpoint("qwen3_moe"), ranks=8, name="on-gpus", gpus_per_rank=gpus)


def test_a_recording_comes_back_as_one_trace(group: Group, random_prompts: Make) -> None:
    with pytest.raises(LoadmasterError, match="nothing has been recorded"):
        group.trace()
    prompts = random_prompts(1, 4)
    group.record(True)
    group.prefill(prompts, domains=["x", "y", "x", "y"])
    group.record(False)
    group.prefill(prompts)
    trace = group.trace(take=True)
    assert trace.num_tokens == sum(map(len, prompts))
    assert set(trace.source.tolist()) == {0, 1}


def test_errors_cross_the_process_border_as_they_are(group: Group) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        group.generate([[]], 4)


@pytest.mark.slow
def test_a_group_that_cannot_start_leaves_nothing_behind(
    ray_cluster: None, checkpoint: Make, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(InputError, match="safetensors only"):
        Group.start(tmp_path, ranks=2, name=BROKEN, cpus_per_rank=0.1)
    assert actors(BROKEN) == set()


def test_another_machines_cluster_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match="token authentication only"):
        connect("10.0.0.7:6379")
