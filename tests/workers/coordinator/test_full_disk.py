"""A full disk under the trace ends the recording, not the serving."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadmaster.traces.recording import token_buffer
from loadmaster.traces.storage import store
from loadmaster.workers.coordinator.coordinator import Coordinator

Make = Callable[..., Any]


def test_serving_goes_on_and_the_group_says_what_was_lost(
    start_threads: Callable[..., Coordinator], checkpoint: Callable[[str], Path],
    random_prompts: Make, serve: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    prompts = random_prompts(4, 6)
    directory = checkpoint("qwen3_moe")
    quiet = start_threads(directory)
    quiet.configure(digests=True)
    want = serve(quiet, prompts, 6)
    monkeypatch.setattr(store, "write_shard", full)
    group = start_threads(directory, record_to=tmp_path / "trace")
    group.configure(digests=True, recording=True)
    assert serve(group, prompts, 6) == want
    told = group.end_recording()
    assert sum(s.lost_tokens for s in told) == sum(len(p) + 5 for p in prompts)
    assert all("No space left on device" in s.failure for s in told if s.tokens + s.lost_tokens)
    assert group.status()["recoveries"] == []


def test_a_folder_that_goes_away_is_said_while_serving_and_what_waits_is_kept(
    start_threads: Callable[..., Coordinator], checkpoint: Callable[[str], Path],
    random_prompts: Make, serve: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_buffer, "LOOK_EVERY_S", 0.0)
    prompts = random_prompts(4, 6)
    group = start_threads(checkpoint("qwen3_moe"), record_to=tmp_path / "trace")
    group.configure(recording=True)
    want = serve(group, prompts, 6)
    assert group.status()["recording_trouble"] == ""
    (tmp_path / "trace").rename(tmp_path / "away")
    assert serve(group, prompts, 6) == want
    assert "trace: is no folder any more" in group.status()["recording_trouble"]
    (tmp_path / "away").rename(tmp_path / "trace")
    assert serve(group, prompts, 6) == want
    assert group.status()["recording_trouble"] == ""
    told = group.end_recording()
    assert sum(s.lost_tokens for s in told) == 0
    assert sum(s.tokens for s in told) == 3 * sum(len(p) + 5 for p in prompts)


def test_a_trace_that_cannot_be_begun_does_not_stop_serving(
    start_threads: Callable[..., Coordinator], checkpoint: Callable[[str], Path],
    random_prompts: Make, serve: Make, tmp_path: Path,
) -> None:
    """Something else stands where the trace should go."""
    (tmp_path / "trace").write_text("not a folder")
    prompts = random_prompts(4, 6)
    group = start_threads(checkpoint("qwen3_moe"), record_to=tmp_path / "trace")
    group.configure(recording=True)
    serve(group, prompts, 6)
    assert "trace" in group.status()["recording_trouble"]
    told = [s for s in group.end_recording() if s is not None]
    assert sum(s.lost_tokens for s in told) == sum(len(p) + 5 for p in prompts)
    assert all(s.failure and "trace" in s.failure for s in told)
    assert group.status()["recoveries"] == []
