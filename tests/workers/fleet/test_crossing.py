"""Each kind of error raised inside another process, and what the person in front sees of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from loadmaster.errors import InfeasibleError, InputError, LoadmasterError, UsageError
from loadmaster.placement.plan import PlanError
from loadmaster.workers.fleet.crossing import crossed
from loadmaster.workers.fleet.fleet import OverdueError, RankLostError
from loadmaster.workers.fleet.ray_fleet import _fetch
from loadmaster.workers.group.connection import Connection, CoordinatorGoneError
from loadmaster.workers.jobs.ray_executor import RayExecutor
from loadmaster.workers.protocol.step_messages import ExchangeError


class CannotTravelError(Exception):
    """Holds what no other process can be given."""

    def __init__(self) -> None:
        super().__init__("mine alone")
        self.lock = threading.Lock()


class TwoPartsError(Exception):
    """Is not made again from what it says."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and\n{two}")


def refuse_file() -> None:
    raise FileNotFoundError(2, "No such file or directory", "/gone/model.safetensors")


def shapes() -> None:
    raise RuntimeError("The size of tensor a (4) must match b (5)\n  at layer 3\n  at layer 4")


OURS: dict[str, LoadmasterError] = {
    "ours": LoadmasterError("it broke", call="pass x=1", command="name --x"),
    "input": InputError("a.json: no such file"), "usage": UsageError("two of them"),
    "infeasible": InfeasibleError("3 slots short"), "plan": PlanError("expert 3 has no slot"),
    "exchange": ExchangeError("peer gone"), "overdue": OverdueError("late"),
    "lost": RankLostError((1,), "rank 1 died"),
}
THEIRS: dict[str, tuple[Callable[[], object], str]] = {
    "value": (lambda: int("x"), "ValueError: invalid literal for int"),
    "key": (lambda: {}["gate_up"], "KeyError: 'gate_up'"),
    "index": (lambda: [][3], "IndexError: list index out of range"),
    "assertion": (lambda: (_ for _ in ()).throw(AssertionError()), "AssertionError"),
    "several lines": (shapes, "RuntimeError: The size of tensor a (4) must match b (5)"),
    "file": (refuse_file, "/gone/model.safetensors: No such file or directory"),
    "memory": (lambda: (_ for _ in ()).throw(MemoryError()), "out of memory"),
    "module": (lambda: __import__("no_such_module"), "No module named 'no_such_module'"),
    "recursion": (lambda: (_ for _ in ()).throw(RecursionError("deep")), "RecursionError: deep"),
    "cannot travel": (lambda: (_ for _ in ()).throw(CannotTravelError()), "mine alone"),
    "two parts": (lambda: (_ for _ in ()).throw(TwoPartsError(1, 2)), "1 and"),
    "result cannot travel": (threading.Lock, "cannot pickle"),
}


class Actor:
    """Raises what it is told, in a process of its own."""

    def ours(self, name: str) -> None:
        raise OURS[name]

    def theirs(self, name: str) -> object:
        return THEIRS[name][0]()

    def die(self) -> None:
        os._exit(1)

    def sleep(self) -> None:
        time.sleep(60)


class NeverBorn:
    """Fails as it is made."""

    def __init__(self, error: Exception) -> None:
        raise error

    def status(self) -> None: ...


def start(kind: type, *args: Any) -> Any:
    return ray.remote(kind).options(num_cpus=0).remote(*args)


@pytest.fixture(scope="module")
def actor(ray_cluster: None) -> Any:
    handle = start(Actor)
    yield handle
    ray.kill(handle)


def asked(actor: Any, method: str, *args: Any) -> LoadmasterError:
    """As whoever holds a group sees it."""
    with pytest.raises(LoadmasterError) as caught:
        Connection("g", actor).ask(method, *args)
    return caught.value


def fetched(actor: Any, method: str, *args: Any) -> LoadmasterError:
    """As a coordinator sees its ranks."""
    answer = getattr(actor, method).remote(*args)
    ray.wait([answer], timeout=30)
    with pytest.raises(LoadmasterError) as caught:
        _fetch(answer)
    return caught.value


@pytest.mark.parametrize("see", [asked, fetched])
@pytest.mark.parametrize("name", OURS)
def test_ours_come_out_as_they_went_in(actor: Any, name: str, see: Callable[..., Any]) -> None:
    found, sent = see(actor, "ours", name), OURS[name]
    assert type(found) is type(sent)
    assert (str(found), found.typed, found.exit_code) == (str(sent), sent.typed, sent.exit_code)


@pytest.mark.parametrize("see", [asked, fetched])
@pytest.mark.parametrize("name", THEIRS)
def test_all_others_are_one_line(actor: Any, name: str, see: Callable[..., Any]) -> None:
    text = str(see(actor, "theirs", name))
    assert THEIRS[name][1] in text
    assert len(text.splitlines()) == 1 and "Traceback" not in text and "ray::" not in text
    assert "g'" in text if see is asked else "rank" in text
    assert name == "memory" or "its log is in" in text


def test_a_task_of_the_planner_says_it_too(ray_cluster: None) -> None:
    executor = RayExecutor(cpus_per_task=0.1)
    with pytest.raises(InfeasibleError, match="3 slots short"):
        list(executor.map(raise_ours, ["infeasible"]))
    with pytest.raises(LoadmasterError, match="a task on the cluster: RuntimeError") as caught:
        list(executor.map(raise_theirs, ["several lines"]))
    assert len(str(caught.value).splitlines()) == 1


def raise_ours(name: str) -> None:
    raise OURS[name]


def raise_theirs(name: str) -> object:
    return THEIRS[name][0]()


def doze() -> None:
    time.sleep(60)


def test_a_process_that_dies_is_said(ray_cluster: None) -> None:
    for see, said in ((asked, "died"), (fetched, "process died")):
        error = see(start(Actor), "die")
        assert said in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(("error", "said"), [
    (LoadmasterError("another writes there"), "'g' did not start: another writes there"),
    (RuntimeError("no\nway"), "'g' did not start: RuntimeError: no"),
])
def test_one_that_cannot_start_says_why(ray_cluster: None, error: Exception, said: str) -> None:
    found = asked(start(NeverBorn, error), "status")
    assert isinstance(found, CoordinatorGoneError)
    assert said in str(found) and len(str(found).splitlines()) == 1 and "ray::" not in str(found)


def test_an_answer_that_is_late_or_called_off_is_said(actor: Any) -> None:
    with pytest.raises(ray.exceptions.GetTimeoutError) as late:
        ray.get(start(Actor).sleep.remote(), timeout=0.1)
    assert "no answer in time" in str(crossed(late.value, "rank 2"))
    with pytest.raises(ray.exceptions.RayError) as off:
        task = ray.remote(doze).options(num_cpus=0.1).remote()
        ray.cancel(task)
        ray.get(task)
    assert "cancelled" in str(crossed(off.value, "a task"))
