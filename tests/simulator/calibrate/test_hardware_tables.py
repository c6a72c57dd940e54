"""Fits of measured tables: errors are honest, nothing is read that must stay unseen."""

from __future__ import annotations

import builtins
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.hardware_tables import (
    ExpertRows,
    deepep_low_latency,
    exchange_us,
    expert_rows_from,
    fit_expert_layers,
    hold_back_half,
    nccl_all_to_all,
    predict_expert_layers,
    read_csv,
)
from loadmaster.errors import InputError
from loadmaster.simulator.calibrate.fits import FitError, fit_exchange
from loadmaster.simulator.calibrate.machine_profile import fit_table

DATA = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "hardware"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data not present: {DATA}")


def expert_rows(rng, rows=60, start=30.0, hbm=3e12, flops=5e14, shape="s"):
    """Rows as a kernel benchmark prints them, exact for the additive model."""
    table = []
    for _ in range(rows):
        tokens, active = int(rng.integers(1, 4000)), int(rng.integers(1, 64))
        us = start + active * 4e7 / hbm * 1e6 + tokens * 8 * 6 * 2048 * 1024 / flops * 1e6
        table.append({
            "shape": shape, "weight_dtype": "bf16", "distribution": "d", "tokens": tokens,
            "pairs": tokens * 8, "active_experts_est": active, "hidden": 2048,
            "intermediate": 1024, "expert_weight_bytes": 4e7, "latency_us": us,
        })
    return expert_rows_from(table)


def test_the_layer_fit_corrects_what_the_batch_size_changes() -> None:
    """A kernel 40 % slower between 1,000 and 2,000 tokens: the table learns it, linearly."""
    rng = np.random.default_rng(1)
    rows = expert_rows(rng, rows=400)
    slower = np.where((rows.tokens > 1000) & (rows.tokens < 2000), 1.4, 1.0)
    bent = ExpertRows(rows.tokens, rows.assignments, rows.active, rows.expert_bytes,
                      rows.flops_per_assignment, rows.us * slower, rows.label, rows.group)
    kept, held = hold_back_half(bent.group, seed=0)
    fits = fit_expert_layers(bent.take(kept))
    seen = bent.take(held)
    error = FitError.of(predict_expert_layers(fits, seen), seen.us)
    assert error.median < 0.05
    plain = FitError.of(fits["s/bf16"].additive_us(seen), seen.us)
    assert error.median < plain.median / 2


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=60), st.integers(0, 9))
def test_half_of_every_group_is_held_back(groups, seed) -> None:
    kept, held = hold_back_half(groups, seed=seed)
    assert sorted([*kept, *held]) == list(range(len(groups)))
    names = np.array(groups)
    for name in set(groups):
        assert (names[held] == name).sum() == (names == name).sum() // 2
    again = hold_back_half(groups, seed=seed)
    assert np.array_equal(again[1], held)


def test_rows_that_cannot_tell_are_refused(tmp_path) -> None:
    same = expert_rows(np.random.default_rng(0), rows=1)
    with pytest.raises(InputError, match="needs at least 4"):
        fit_expert_layers(same)
    with pytest.raises(InputError, match="no such table"):
        read_csv(tmp_path / "absent.csv")
    (tmp_path / "empty.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="no rows"):
        read_csv(tmp_path / "empty.csv")


# ---- on the measured tables ---------------------------------------------------------------------


@needs_data
def test_the_deepep_fit_never_reads_the_published_table(monkeypatch) -> None:
    """Every file the fit opens is noted; the published numbers are not among them."""
    opened: list[str] = []
    real_open, real_path_open = builtins.open, pathlib.Path.open

    def note(path, *args, **kwargs):
        opened.append(str(path))
        return real_open(path, *args, **kwargs)

    def note_path(path, *args, **kwargs):
        opened.append(str(path))
        return real_path_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", note)
    monkeypatch.setattr(pathlib.Path, "open", note_path)
    rows = read_csv(DATA / "h100_deepep_low_latency.csv")
    for direction in ("dispatch", "combine"):
        fit_exchange(deepep_low_latency(rows, direction, tier="nic"))
    assert [pathlib.Path(p).name for p in opened if "shared" in p] == [
        "h100_deepep_low_latency.csv"
    ]


@needs_data
def test_published_deepep_latencies_are_predicted_from_the_other_table() -> None:
    """EP 32, dispatch, 128 tokens: 155 us published on another machine."""
    rows = read_csv(DATA / "h100_deepep_low_latency.csv")
    fit = fit_exchange(deepep_low_latency(rows, "dispatch", tier="nic"))
    assert float(exchange_us(fit, 4, 128 * 8 * 7392 * 3 / 4)) == pytest.approx(155.0, rel=0.16)
    assert fit.error.median < 0.03


@needs_data
def test_held_back_fused_moe_rows_are_predicted() -> None:
    rows = expert_rows_from(read_csv(DATA / "h100_fused_moe.csv"))
    kept, held = hold_back_half(rows.group, seed=0)
    seen = rows.take(held)
    error = FitError.of(predict_expert_layers(fit_expert_layers(rows.take(kept)), seen), seen.us)
    assert error.median <= 0.05 and error.p90 <= 0.15


@needs_data
def test_nccl_keeps_its_plateau() -> None:
    """64 KiB to 1 MiB on eight GPUs cost about the same; a line says four times."""
    rows = nccl_all_to_all(read_csv(DATA / "h100_nccl_alltoall.csv"), 8)
    table_bytes, table_us = fit_table(rows.port_bytes, rows.us)
    small, large = np.interp([2**16, 2**20], table_bytes, table_us)
    assert large / small < 2.0
