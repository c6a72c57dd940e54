"""The journal: whatever instant a coordinator dies in, its successor knows what to do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.placement.plan import Plan
from loadmaster.workers.coordinator.journal import Journal
from loadmaster.workers.protocol.phase_plans import PhasePlans


def some_plans(seed: int) -> PhasePlans:
    rng = np.random.default_rng(seed)
    return PhasePlans.both(Plan(slots=rng.permutation(6).reshape(1, 3, 2), num_experts=6))


def test_a_new_journal_says_nothing(tmp_path: Path) -> None:
    state = Journal(tmp_path / "new").read()
    assert (state.plans, state.epoch, state.unfinished) == (None, 1, None)


def test_what_was_done_is_active(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("stage", 2, some_plans(2))
    journal.write("commit", 2)
    journal.write("done", 2)
    state = Journal(tmp_path).read()
    assert state.plans is not None
    assert state.plans.prefill.same_slots(some_plans(2).prefill)
    assert (state.epoch, state.unfinished) == (2, None)


@pytest.mark.parametrize("committing", [False, True])
def test_a_switch_without_an_end_is_undone_before_the_commit_and_finished_after(
    tmp_path: Path, committing: bool
) -> None:
    journal = Journal(tmp_path)
    journal.write("stage", 2, some_plans(2))
    journal.write("done", 2)
    journal.write("stage", 3, some_plans(3))
    if committing:
        journal.write("commit", 3)
    state = Journal(tmp_path).read()
    assert state.epoch == 2
    assert state.unfinished is not None
    assert state.unfinished.prefill.same_slots(some_plans(3).prefill)
    assert (state.unfinished_epoch, state.committing) == (3, committing)


def test_an_aborted_switch_leaves_no_trace(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("stage", 2, some_plans(2))
    journal.write("abort", 2)
    assert journal.read() == Journal(tmp_path / "other").read()


def test_a_line_cut_off_by_a_crash_is_no_line(tmp_path: Path) -> None:
    """Cut the file after every byte: it always reads, and never claims more than was written."""
    journal = Journal(tmp_path)
    journal.write("stage", 2, some_plans(2))
    journal.write("commit", 2)
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        state = journal.read()
        assert not state.committing
        assert (state.unfinished is not None) == (b"\n" in whole[:size])


def test_writing_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("stage", 2, some_plans(2))
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"phase": "com')
    Journal(tmp_path).write("abort", 2)
    assert Journal(tmp_path).read().unfinished is None


def test_lives_are_counted(tmp_path: Path) -> None:
    assert [Journal(tmp_path).begin_life() for _ in range(3)] == [0, 1, 2]
    assert Journal(tmp_path).read().epoch == 1


@pytest.mark.parametrize("line", ["[]", '{"phase": "stage"}', '{"phase": "x", "epoch": 1}', "no"])
def test_something_else_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "journal.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"journal\.jsonl:1: "):
        Journal(tmp_path).read()


def test_the_folder_is_the_owners_alone(tmp_path: Path) -> None:
    folder = Journal(tmp_path / "mine").folder
    assert os.stat(folder).st_mode & 0o077 == 0
