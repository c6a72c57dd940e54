"""Does it fit, as typed: exit 3 with one line, fewer spare slots with a note, no model no claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadmaster.placement.plan import Plan
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace

from .test_cli import Run, run

__all__ = ["run"]      # fixtures

GB = 1_000_000_000
# 10 layers of 16 experts of 100 MB each: a slot in every layer is 1 GB.
MODEL = {
    "name": "wide", "num_layers": 10, "num_experts": 16, "top_k": 2, "hidden": 64,
    "intermediate": 128, "scale_bytes_per_expert": GB // 10 - 49_152, "dense_bytes": 6 * GB,
}
ASK = ("--devices-per-node", 4, "--method", "greedy", "--effort", "fast", "--step-tokens", 64,
       "--concurrency", 8)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(trace, model)."""
    made = synth_trace(layers=10, experts=16, top_k=2, tokens=2_000, request_tokens=50)
    save_trace(made, tmp_path / "trace")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return tmp_path / "trace", tmp_path / "model.json"


def reserve(slots: float) -> int:
    """Bytes kept free that leave memory for so many slots on a device of 85,899,345,920 bytes."""
    return 85_899_345_920 - 6 * GB - round(slots * GB)


def asked(run: Run, files: tuple[Path, Path], *more: Any) -> tuple[int, str, str]:
    trace, model = files
    found: tuple[int, str, str] = run("plan", trace, "--model", model, *ASK, *more)
    return found


def test_what_cannot_fit_ends_with_3_and_one_line(run: Run, files: tuple[Path, Path]) -> None:
    code, out, err = asked(run, files, "--reserve-bytes", reserve(3.5))
    assert code == 3 and not out
    line = err.strip().splitlines()[-1]
    assert "memory holds 3 slots" in line and "it takes 6 such devices (2 nodes of 4)" in line


def test_spare_slots_shrink_to_what_fits_and_it_is_said(
    run: Run, files: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    code, out, _ = asked(run, files, "--reserve-bytes", reserve(4.5), "-o", plan)
    assert code == 0 and Plan.load(plan).slots_per_device == 4
    assert "4 slots per device, not the usual 5" in " ".join(out.split())


def test_slots_that_are_named_and_do_not_fit_are_refused(
    run: Run, files: tuple[Path, Path]
) -> None:
    code, _, err = asked(run, files, "--reserve-bytes", reserve(5.5), "--slots-per-device", 6)
    assert code == 3 and "use 5 slots per device" in err


def test_evaluate_and_simulate_know_the_same_reserve(
    run: Run, files: tuple[Path, Path], tmp_path: Path
) -> None:
    trace, model = files
    plan = tmp_path / "plan.json"
    assert asked(run, files, "-o", plan)[0] == 0
    less = ("--reserve-bytes", reserve(4.5))
    code, out, _ = run("evaluate", trace, plan, "--model", model, "--step-tokens", 64,
                       "--concurrency", 8, *less)
    assert code == 0 and "plan: over memory: 5.0 GB of experts" in " ".join(out.split())
    code, out, _ = run("simulate", trace, plan, "--model", model, "--requests", 8,
                       "--prompt-tokens", 8, "--output-tokens", 4, *less)
    assert code == 0 and "over memory: 5.0 GB of experts" in " ".join(out.split())


@pytest.mark.parametrize(("given", "said"), [
    ("-1", "must be at least 0"), ("nan", "valid integer"), ("99999999999999", "must lie in"),
])
def test_a_reserve_that_cannot_be_is_a_mistake_of_usage(
    run: Run, files: tuple[Path, Path], given: str, said: str
) -> None:
    code, _, err = asked(run, files, "--reserve-bytes", given)
    assert code == 2 and said in err and "Traceback" not in err


def test_without_sizes_it_is_said_that_nothing_was_checked(
    run: Run, files: tuple[Path, Path]
) -> None:
    code, out, _ = run("plan", files[0], *ASK)
    assert code == 0 and "whether it fits in memory is not checked" in " ".join(out.split())


def test_a_grid_of_scenarios_tells_which_do_not_fit(
    run: Run, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """80 experts' worth of slots on one device are 80 GB: beside 6 GB that is too much."""
    trace, model = files
    grid = tmp_path / "grid.yaml"
    grid.write_text("base: {devices_per_node: 4}\naxes: {slots_per_device: [4, 80]}\n")
    code, out, _ = run("whatif", trace, grid, "--model", model, "--requests", 8,
                       "--prompt-tokens", 8, "--output-tokens", 4, "--json")
    found = json.loads(out)
    assert code == 0 and [c["fields"]["slots_per_device"] for c in found["cells"]] == [4]
    assert "memory holds 71 slots" in found["failed"][0]["error"]
