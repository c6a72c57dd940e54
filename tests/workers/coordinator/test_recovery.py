"""Ranks die; every request is answered all the same, and not one token is wrong.

Ranks are threads here: `kill` makes one fall silent and closes its connections, as death does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from loadmaster.errors import LoadmasterError
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.fleet.fleet import RankLostError
from loadmaster.workers.fleet.thread_fleet import ThreadFleet
from loadmaster.workers.protocol.settings import RankSettings, served_spec
from loadmaster.workers.rank.rank import Rank

from ..conftest import groups_of_threads

Start = Callable[..., Coordinator]
Get = Callable[[str], Path]
Make = Callable[..., Any]


class FrailFleet(ThreadFleet):
    """Kills a rank when the `count`-th call of a method reaches it; may refuse replacements."""

    def __init__(self, method: str, rank: int, count: int, *, replaceable: bool = True) -> None:
        super().__init__()
        self.plan = (method, rank)
        self.left = count
        self.replaceable = replaceable

    def call(self, rank: int, method: str, *args: Any, **options: Any) -> Any:
        if (method, rank) == self.plan:
            self.left -= 1
            if self.left == 0:
                answer = super().call(rank, method, *args, **options)
                threading.Timer(0.002, self.kill, (rank,)).start()
                return answer
        return super().call(rank, method, *args, **options)

    def replace(self, settings: RankSettings, timeout_s: float) -> None:
        if not self.replaceable:
            raise RankLostError((settings.rank,), "no room")
        super().replace(settings, timeout_s)


@pytest.fixture(scope="module")
def wanted(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Get, random_prompts: Make, serve: Make
) -> tuple[list[list[int]], list[tuple[tuple[int, ...], str]]]:
    """Prompts, and what an undisturbed group makes of them."""
    prompts = random_prompts(21, 8)
    with groups_of_threads(tmp_path_factory) as start:
        group = start(checkpoint("qwen3_moe"))
        group.configure(digests=True)
        return prompts, serve(group, prompts, 12)


def finish(group: Coordinator, numbers: Sequence[int]) -> list[tuple[tuple[int, ...], str]]:
    states = group.wait_all(list(numbers), 60.0)
    assert [s.error for s in states] == [""] * len(states)
    return [(s.tokens, s.digest) for s in states]


@pytest.mark.parametrize("count", [1, 2, 5, 11])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_killed_at_any_step_costs_no_request_and_no_bit(
    start_threads: Start, checkpoint: Get, wanted: Any, rank: int, count: int
) -> None:
    prompts, want = wanted
    group = start_threads(checkpoint("qwen3_moe"), fleet=FrailFleet("step", rank, count))
    group.configure(digests=True)
    numbers = group.submit(prompts, 12)
    assert finish(group, numbers) == want
    (recovery,) = group.status()["recoveries"]
    assert recovery.replaced == (rank,)
    assert recovery.seconds > 0


def test_a_rank_killed_while_experts_move(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, wanted: Any
) -> None:
    prompts, want = wanted
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    fleet = FrailFleet("nothing", 1, 0)
    group = start_threads(directory, stage_budget_bytes=8192, fleet=fleet)
    group.configure(digests=True)
    numbers = group.submit(prompts, 12)
    fleet.plan, fleet.left = ("step", 1), 4
    target = shuffled_plan(spec, 1)
    before = group.status()["plan"]
    report = group.apply(target)
    assert finish(group, numbers) == want
    assert group.status()["epoch"] == 2
    assert len(group.status()["recoveries"]) == 1
    assert list(report.moved) == before.moves_to(target)
    assert report.retried_bytes > 0, "what had arrived was sent again"


def test_a_rank_killed_in_the_committing_step_rolls_forward(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make, wanted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commit had begun and every expert had arrived: the new plan is active afterwards."""
    prompts, want = wanted
    directory = checkpoint("qwen3_moe")
    fleet = ThreadFleet()
    group = start_threads(directory, fleet=fleet)
    group.configure(digests=True)
    commit, killed = Rank.commit, []

    def die(self: Rank, tables: Any) -> None:
        if self.settings.rank == 3 and tables.epoch == 2 and not killed:
            killed.append(True)
            fleet.kill(3)
            raise RankLostError((3,), "killed in the commit")
        commit(self, tables)

    monkeypatch.setattr(Rank, "commit", die)
    numbers = group.submit(prompts, 12)
    target = shuffled_plan(served_spec(directory, "bfloat16"), 1)
    group.apply(target)
    assert killed
    assert group.status()["epoch"] == 2
    assert group.status()["plan"].same_slots(target)
    assert finish(group, numbers) == want


def test_a_death_while_idle_is_noticed_and_mended(
    start_threads: Start, checkpoint: Get, wanted: Any, serve: Make
) -> None:
    prompts, want = wanted
    fleet = ThreadFleet()
    group = start_threads(checkpoint("qwen3_moe"), fleet=fleet)
    group.configure(digests=True)
    fleet.kill(1)
    deadline = time.monotonic() + 20.0
    while not group.status()["recoveries"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group.status()["recoveries"][0].replaced == (1,)
    assert serve(group, prompts, 12) == want


def test_ranks_lost_for_good_are_done_without(
    start_threads: Start, checkpoint: Get, wanted: Any
) -> None:
    prompts, want = wanted
    fleet = FrailFleet("step", 2, 3, replaceable=False)
    group = start_threads(checkpoint("qwen3_moe"), fleet=fleet)
    group.configure(digests=True)
    numbers = group.submit(prompts, 12)
    assert finish(group, numbers) == want
    status = group.status()
    assert status["plan"].num_devices == 3
    assert status["recoveries"][0].left == (2,)


def test_when_the_survivors_have_no_room_the_group_says_why(
    start_threads: Start, checkpoint: Get, wanted: Any
) -> None:
    prompts, _ = wanted
    fleet = FrailFleet("step", 2, 3, replaceable=False)
    group = start_threads(checkpoint("qwen3_moe"), fleet=fleet, most_slots=2)
    numbers = group.submit(prompts, 12)
    states = group.wait_all(numbers, 60.0)
    assert all("3 surviving devices have 6 slots for 8 experts: 2 short" in s.error for s in states)
    with pytest.raises(LoadmasterError, match="does not serve any more"):
        group.submit([[1]], 1)


def test_a_step_that_always_fails_fails_its_requests_and_not_the_group(
    start_threads: Start, checkpoint: Get, monkeypatch: pytest.MonkeyPatch, serve: Make
) -> None:
    group = start_threads(checkpoint("qwen3_moe"))
    inner = Rank._step

    def poisoned(self: Rank, work: Any) -> Any:
        if any(13 in c.tokens for c in work.chunks):
            raise LoadmasterError("this token cannot be borne")
        return inner(self, work)

    monkeypatch.setattr(Rank, "_step", poisoned)
    numbers = group.submit([[13, 2, 3]], 4)
    (state,) = group.wait_all(numbers, 60.0)
    assert "3 steps in a row failed, the last with: this token cannot be borne" in state.error
    assert len(serve(group, [[1, 2, 3]], 4)[0][0]) == 4


def test_a_changed_checkpoint_is_not_let_in(
    start_threads: Start, checkpoint: Get, tmp_path: Path
) -> None:
    """A rank that comes back reads its experts again; they must be the ones the others serve."""
    import shutil

    from safetensors.torch import load_file, save_file

    directory = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_moe"), directory)
    fleet = ThreadFleet()
    group = start_threads(directory, fleet=fleet)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"][0, 0] += 1
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fleet.kill(1)
    numbers = group.submit([[1, 2, 3]], 2)
    (state,) = group.wait_all(numbers, 60.0)
    assert "expert 2 of layer 0 on rank 1 differs" in state.error


def test_ranks_join_and_leave(
    start_threads: Start, checkpoint: Get, wanted: Any, serve: Make, shuffled_plan: Make
) -> None:
    prompts, want = wanted
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    group = start_threads(directory)
    group.configure(digests=True)
    assert group.resize(6).num_devices == 6
    group.apply(shuffled_plan(spec, 3, ranks=6))
    assert serve(group, prompts, 12) == want
    assert group.measurements().rows.shape[1] == 6
    assert group.resize(3).num_devices == 3
    assert serve(group, prompts, 12) == want


def test_where_no_rank_can_join_the_group_serves_on_as_it_is(
    start_threads: Start, checkpoint: Get, wanted: Any, serve: Make
) -> None:
    class Full(ThreadFleet):
        def add(self, settings: RankSettings, timeout_s: float) -> None:
            if self.ranks == 5:
                raise RankLostError((settings.rank,), "no room")
            super().add(settings, timeout_s)

    prompts, want = wanted
    fleet = Full()
    group = start_threads(checkpoint("qwen3_moe"), fleet=fleet)
    group.configure(digests=True)
    with pytest.raises(LoadmasterError, match="stays at 4 ranks: no room"):
        group.resize(6)
    assert fleet.ranks == 4 and group.status()["recoveries"] == []
    assert serve(group, prompts, 12) == want


@pytest.mark.parametrize("replaceable", [True, False])
def test_a_rank_may_die_while_another_is_replaced(
    start_threads: Start, checkpoint: Get, wanted: Any, replaceable: bool
) -> None:
    class Twice(FrailFleet):
        """Rank 1 dies as soon as the group forms again for the first time."""

        formed = 0

        def call(self, rank: int, method: str, *args: Any, **options: Any) -> Any:
            if method == "meet" and rank == 1:
                self.formed += 1
                if self.formed == 2:
                    self.kill(1)
            return super().call(rank, method, *args, **options)

    prompts, want = wanted
    fleet = Twice("step", 2, 3, replaceable=replaceable)
    group = start_threads(checkpoint("qwen3_moe"), fleet=fleet, step_timeout_s=5.0)
    group.configure(digests=True)
    assert finish(group, group.submit(prompts, 12)) == want
    assert group.status()["plan"].num_devices == (4 if replaceable else 2)


@pytest.mark.parametrize("committing", [False, True])
def test_a_new_coordinator_finishes_or_undoes_what_a_dead_one_began(
    start_threads: Start, checkpoint: Get, wanted: Any, serve: Make, shuffled_plan: Make,
    committing: bool,
) -> None:
    """The first coordinator stops dead while experts are staged; the ranks live on."""
    from loadmaster.workers.protocol.phase_plans import PhasePlans

    prompts, want = wanted
    directory = checkpoint("qwen3_moe")
    fleet = ThreadFleet()
    first = start_threads(directory, fleet=fleet)
    target = shuffled_plan(served_spec(directory, "bfloat16"), 1)
    first._journal.write("stage", 2, PhasePlans.both(target))
    if committing:
        first._journal.write("commit", 2)
    with first._changed:
        first._stopping = True
        first._changed.notify_all()
    second = Coordinator(first.settings, fleet)
    second.resume()
    try:
        second.configure(digests=True)
        assert serve(second, prompts, 12) == want
        status = second.status()
        assert status["plan"].same_slots(target) == committing
        assert status["epoch"] == (2 if committing else 1)
        assert not set(second.submit([[1]], 1)) & set(range(100)), "numbers are not given twice"
    finally:
        second.stop()


def test_prefill_and_decode_under_plans_of_their_own(
    start_threads: Start, checkpoint: Get, wanted: Any, serve: Make, shuffled_plan: Make
) -> None:
    prompts, want = wanted
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    group = start_threads(directory)
    group.configure(digests=True)
    numbers = group.submit(prompts, 12)
    prefill, decode = shuffled_plan(spec, 1), shuffled_plan(spec, 2)
    group.apply(prefill, decode)
    assert finish(group, numbers) == want
    assert serve(group, prompts, 12) == want
    assert group.status()["decode_plan"].same_slots(decode)
    group.apply(prefill)
    assert serve(group, prompts, 12) == want


def test_a_plan_made_under_another_epoch_is_refused(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make
) -> None:
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    group = start_threads(directory)
    group.apply(shuffled_plan(spec, 1), epoch=1)
    with pytest.raises(LoadmasterError, match="made under epoch 1, and 2 is active"):
        group.apply(shuffled_plan(spec, 2), epoch=1)


def test_applies_wait_for_each_other(
    start_threads: Start, checkpoint: Get, shuffled_plan: Make
) -> None:
    directory = checkpoint("qwen3_moe")
    spec = served_spec(directory, "bfloat16")
    group = start_threads(directory, stage_budget_bytes=4096)
    reports: list[Any] = []
    threads = [
        threading.Thread(target=lambda s=s: reports.append(group.apply(shuffled_plan(spec, s))))
        for s in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert sorted(r.epoch for r in reports) == [2, 3, 4]
