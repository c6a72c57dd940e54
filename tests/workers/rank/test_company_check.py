"""A request's bits in a whole model, alone and in company; and what is said where they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.random_checkpoint import ARCHITECTURES, save_random_checkpoint
from loadmaster.kernels import weights
from loadmaster.kernels.cpu.packed import PackedSlots
from loadmaster.kernels.cpu.row_blocks import SIZES_TO_TRY
from loadmaster.placement.cluster import Cluster
from loadmaster.workers.coordinator.coordinator import Coordinator
from loadmaster.workers.protocol.settings import RankSettings
from loadmaster.workers.protocol.step_messages import Chunk
from loadmaster.workers.rank import attention, company_check
from loadmaster.workers.rank.attention import PackedStep, live_rows, running
from loadmaster.workers.rank.company_check import company_fault
from loadmaster.workers.rank.rank import Loaded, Rank
from loadmaster.workers.rank.step_rows import HEAD_ROWS, last_rows


def load(directory: Path, dtype: str = "bfloat16") -> tuple[Rank, Loaded]:
    cluster = Cluster.preset("cpu", devices_per_node=1, slots_per_device=8)
    rank = Rank(RankSettings(0, 1, str(directory), cluster, dtype))
    return rank, rank.load()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_model_mixes_requests(architecture: str, dtype: str, tmp_path: Path) -> None:
    _, loaded = load(save_random_checkpoint(architecture, tmp_path), dtype)
    assert not [note for note in loaded.notes if "in company" in note]
    assert loaded.experts_backend in ("panels", "packed", "torch")


class Mixing(torch.nn.Module):
    """A norm over all rows of a step, as a model's own code might have one."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        y = self.inner(x)
        return y - 1e-2 * y.mean(dim=1, keepdim=True)


def test_a_model_that_mixes_requests_is_told_of(tmp_path: Path) -> None:
    rank, _ = load(save_random_checkpoint("mixtral", tmp_path))
    model = rank._model
    model.model.norm = Mixing(model.model.norm)
    fault = company_fault(model, rank._checkpoint.expert_modules, 256, ("mixing", str(tmp_path)))
    assert "rows of a request have other bits in company than alone" in fault


def test_each_checkpoint_is_tried_once_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    original = company_check._company_fault
    monkeypatch.setattr(
        company_check, "_company_fault", lambda *given: tried.append(1) or original(*given)
    )
    save_random_checkpoint("mixtral", tmp_path)
    for dtype in ("bfloat16", "bfloat16", "float32"):
        load(tmp_path, dtype)
    assert len(tried) == 2


class CheatingSlots(PackedSlots):
    """The place in a block shows in the bits."""

    def _block(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        y = super()._block(slot, x)
        y[1:].view(torch.int16)[:, 0] += 1
        return y


def test_a_rank_says_which_backend_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "packed_available", lambda dtype: True)
    monkeypatch.setattr(weights, "panels_preferred", lambda *shape: False)
    monkeypatch.setattr(weights, "PackedSlots", CheatingSlots)
    rank, loaded = load(save_random_checkpoint("qwen3_moe", tmp_path))
    assert loaded.experts_backend in ("panels", "torch")
    notes = [note.split(":")[0] for note in loaded.notes]
    assert notes[: len(SIZES_TO_TRY)] == [
        f"experts, packed in blocks of {', '.join(map(str, sizes))} rows" for sizes in SIZES_TO_TRY
    ]
    assert rank.load() is loaded


def test_a_groups_status_names_the_backend_and_what_was_refused(
    start_threads: Callable[..., Coordinator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what no rank can know: that another one computes in another way."""
    quiet = start_threads(save_random_checkpoint("mixtral", tmp_path), ranks=2).status()
    assert quiet["experts_backend"] in ("panels", "packed", "torch")
    assert not [note for note in quiet["notes"] if "in different ways" in note]
    ranks = []
    original = Rank.load

    def load_in_turn(rank: Rank) -> Loaded:
        ranks.append(rank)
        loaded = original(rank)
        if rank.settings.rank == 0:
            return dataclasses.replace(loaded, experts_backend="packed", notes=("why not",))
        return dataclasses.replace(loaded, experts_backend="torch", notes=("why not",))

    monkeypatch.setattr(Rank, "load", load_in_turn)
    told = start_threads(tmp_path, ranks=2).status()
    assert len(ranks) == 2 and told["experts_backend"] == "packed, torch"
    assert told["notes"][0] == "why not" and len(told["notes"]) == 2
    assert "in different ways (packed, torch)" in told["notes"][1]


def test_a_step_is_padded_so_that_no_tensor_has_a_rest() -> None:
    """One number a row, in the narrowest type, still fills whole pairs of the widest vectors."""
    for rows in (0, 1, 63, 64, 65, 4097):
        step = PackedStep([rows], [])
        assert step.padded_rows % 64 == 0 and step.padded_rows >= max(rows, 1)
        assert step.padded_rows - rows <= attention.STEP_ROWS
        with running(step):
            assert live_rows(step.padded_rows) == rows
            assert live_rows(step.padded_rows + 16) == step.padded_rows + 16
    assert live_rows(64) == 64


@pytest.mark.parametrize(("wanting", "padded"), [(0, 16), (1, 16), (16, 16), (17, 32)])
def test_the_head_gets_whole_steps_of_rows(wanting: int, padded: int) -> None:
    chunks = tuple(
        Chunk(n, np.array([1, 2], np.int32), 0, 0, -1, n < wanting) for n in range(20)
    )
    rows = last_rows(chunks)
    assert len(rows) == padded and padded % HEAD_ROWS == 0
    assert rows[:wanting].tolist() == [2 * n + 1 for n in range(wanting)]
