"""The line to a coordinator: dead for good, away for a while, late, or wrong."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from loadmaster.errors import InputError, LoadmasterError
from loadmaster.workers.group.connection import (
    Connection,
    CoordinatorGoneError,
    CoordinatorLostError,
)
from loadmaster.workers.group.prompt_tokens import as_tokens


class Leader:
    """Answers, dies, comes late."""

    def status(self) -> str:
        return "well"

    def die(self) -> None:
        os._exit(1)

    def late(self) -> None:
        Future[None]().result(0.01)


@pytest.fixture
def leader(ray_cluster: None) -> Any:
    def start(restarts: int) -> Any:
        return ray.remote(Leader).options(num_cpus=0, max_restarts=restarts).remote()

    return start


def test_a_coordinator_dead_for_good_is_known_at_once(leader: Any) -> None:
    actor = leader(0)
    line = Connection("g", actor)
    assert line.ask("status") == "well"
    ray.kill(actor, no_restart=True)
    began = time.monotonic()
    with pytest.raises(CoordinatorGoneError, match="'g' is dead and will not come back"):
        # The kill is on its way, not done: calls that overtake it are still answered.
        while time.monotonic() - began < 20.0:
            line.ask_again("status")
    assert time.monotonic() - began < 20.0


def test_one_that_comes_back_is_waited_for(leader: Any) -> None:
    line = Connection("g", leader(-1))
    line.ask("status")
    with pytest.raises(CoordinatorLostError) as caught:
        line.ask("die")
    assert not isinstance(caught.value, CoordinatorGoneError)
    assert line.ask_again("status") == "well"


def test_an_answer_that_came_too_late_is_said_in_words(leader: Any) -> None:
    with pytest.raises(LoadmasterError, match=r"did not get to 'late' in the time.*may still"):
        Connection("g", leader(0)).ask("late")


@pytest.mark.parametrize("prompt", ["half a pair: \ud800", "\udfff"])
def test_text_that_no_encoding_can_hold_is_refused(prompt: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="surrogate"):
        as_tokens(prompt, str(tmp_path))


@pytest.mark.parametrize("prompt", [[[1, 2], [3]], [1, [2, 3]]])
def test_ragged_prompts_are_refused(prompt: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="list of token ids"):
        as_tokens(prompt, str(tmp_path))


def test_token_ids_pass_as_they_are(tmp_path: Path) -> None:
    assert as_tokens([1, 2], str(tmp_path)) == [1, 2]
    tokens = np.array([3, 4])
    assert as_tokens(tokens, str(tmp_path)) is tokens  # type: ignore[arg-type, comparison-overlap]
