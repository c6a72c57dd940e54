"""A coordinator that takes over: what was begun, what was switched on, who is lost meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import LoadmasterError
from loadmaster.foundation.lock import Lock
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.fleet.thread_fleet import ThreadFleet
from loadmaster.workers.protocol.phase_plans import PhasePlans
from loadmaster.workers.protocol.settings import served_spec

Start = Callable[..., Coordinator]
Get = Callable[[str], Path]
Make = Callable[..., Any]


class Survivors(ThreadFleet):
    """Tells a successor of live ranks only, as actors do."""

    def attach(self, timeout_s: float) -> list[Any]:
        return self.gather(
            [t.call("state") for t in self._threads if t.alive], timeout_s
        )


def die(coordinator: Coordinator) -> None:
    """Stop dead: the thread that serves ends, the ranks live on."""
    with coordinator._changed:
        coordinator._stopping = True
        coordinator._changed.notify_all()
    assert coordinator._thread is not None
    coordinator._thread.join()


@pytest.fixture
def follow() -> Any:
    """Another coordinator after one that has died; it ends with the test."""
    started: list[Coordinator] = []

    def start(first: Coordinator, fleet: ThreadFleet) -> Coordinator:
        second = Coordinator(first.settings, fleet)
        second.resume()
        started.append(second)
        return second

    yield start
    for coordinator in started:
        coordinator.stop()


def test_what_callers_switched_on_stays_on(
    start_threads: Start, checkpoint: Get, random_prompts: Make, serve: Make, follow: Make
) -> None:
    fleet = Survivors()
    first = start_threads(checkpoint("qwen3_moe"), fleet=fleet)
    first.configure(recording=True, digests=True, step_tokens=48)
    prompts = random_prompts(3, 4)
    numbers = first.submit(prompts, 1, ["b", "a", "b", "a"])
    first.wait_all(numbers, 60.0)
    steps = first.status()["step"]
    die(first)

    second = follow(first, fleet)
    status = second.status()
    assert (status["recording"], status["step_tokens"], status["step"]) == (True, 48, steps)
    numbers = second.submit(prompts, 1, ["c", "a", "c", "b"])
    assert all(s.digest for s in second.wait_all(numbers, 60.0))
    trace = second.trace()
    assert trace is not None and trace.step is not None and trace.domain is not None
    assert trace.domain_names == ("b", "a", "c")
    later = trace.step > steps
    assert later.any() and not later.all(), "no step number is given twice"
    tokens = np.bincount(trace.domain[later], minlength=3).tolist()
    assert tokens == [len(prompts[3]), len(prompts[1]), len(prompts[0]) + len(prompts[2])]


@pytest.mark.parametrize("replaceable", [True, False])
def test_a_rank_that_died_with_the_coordinator_is_replaced_or_done_without(
    start_threads: Start, checkpoint: Get, random_prompts: Make, serve: Make, follow: Make,
    replaceable: bool,
) -> None:
    class Fleet(Survivors):
        def replace(self, settings: Any, timeout_s: float) -> None:
            if not replaceable:
                from loadmaster.workers.fleet.fleet import RankLostError

                raise RankLostError((settings.rank,), "no room")
            super().replace(settings, timeout_s)

    fleet = Fleet()
    first = start_threads(checkpoint("qwen3_moe"), fleet=fleet)
    first.configure(digests=True)
    prompts = random_prompts(4, 6)
    want = serve(first, prompts, 8)
    die(first)
    fleet.kill(2)

    second = follow(first, fleet)
    assert serve(second, prompts, 8) == want
    (recovery,) = second.status()["recoveries"]
    assert (recovery.replaced, recovery.left) == (((2,), ()) if replaceable else ((), (2,)))
    assert second.status()["plan"].num_devices == (4 if replaceable else 3)

    die(second)      # what the first successor did is in the journal for the next
    third = follow(second, fleet)
    assert serve(third, prompts, 8) == want
    assert third.status()["plan"].same_slots(second.status()["plan"])


@pytest.mark.parametrize("ranks", [3, 5])
def test_a_change_of_size_that_had_begun_is_finished(
    start_threads: Start, checkpoint: Get, random_prompts: Make, serve: Make, shuffled_plan: Make,
    follow: Make, ranks: int,
) -> None:
    fleet = Survivors()
    directory = checkpoint("qwen3_moe")
    first = start_threads(directory, fleet=fleet)
    first.configure(digests=True)
    prompts = random_prompts(5, 6)
    want = serve(first, prompts, 4)
    target = shuffled_plan(served_spec(directory, "bfloat16"), 7, ranks=ranks)
    first._journal.resize(2, PhasePlans.both(target))
    die(first)

    second = follow(first, fleet)
    assert second.status()["plan"].same_slots(target)
    assert len(second.status()["pids"]) == ranks
    assert serve(second, prompts, 4) == want


def test_without_any_rank_left_the_group_says_so(
    start_threads: Start, checkpoint: Get, follow: Make
) -> None:
    fleet = Survivors()
    first = start_threads(checkpoint("qwen3_moe"), fleet=fleet)
    die(first)
    for rank in range(4):
        fleet.kill(rank)
    second = follow(first, fleet)
    with pytest.raises(LoadmasterError, match="no rank outlived the coordinator"):
        second.submit([[1]], 1)


def test_a_lock_ends_with_whoever_holds_it(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "new" / "lock"), Lock(tmp_path / "new" / "lock")
    assert first.take()
    assert not second.take(0.1)
    first.release()
    assert second.take()
    second.release()
