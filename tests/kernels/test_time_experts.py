"""The expert bench measures what it says, and its scripts run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loadmaster.errors import InputError
from loadmaster.kernels.time_experts import (
    COLD_BYTES,
    SILU,
    cold_layers,
    steady_medians_us,
    time_experts,
)

ROOT = Path(__file__).resolve().parents[2]


def test_every_combination_is_one_row_in_order() -> None:
    timings = time_experts(
        256, 512, dtype=torch.bfloat16, tokens_per_expert=(1, 32), active_experts=(1, 3), repeats=3
    )
    points = [(t.tokens_per_expert, t.active_experts, t.phase) for t in timings]
    assert points == [(1, 1, "decode"), (1, 3, "decode"), (32, 1, "prefill"), (32, 3, "prefill")]
    assert all(t.cpu_us > 0 and t.dtype == "bfloat16" for t in timings)
    # 96 rows of three cold experts take longer than one row of one.
    assert timings[3].cpu_us > timings[0].cpu_us


def test_weights_do_not_fit_a_cache() -> None:
    layers = cold_layers(
        512, 1024, torch.float32, torch.device("cpu"), "torch", SILU, slots=4, seed=0
    )
    assert {weights.shape.slots for weights in layers} == {4}
    assert sum(weights.shape.slots * weights.bytes_per_slot for weights in layers) >= COLD_BYTES


def test_a_machine_that_changes_its_speed_biases_no_run() -> None:
    """Every run is 1 % slower than the one before."""
    runs_so_far = 0

    def takes(us: float):
        def once() -> float:
            nonlocal runs_so_far
            runs_so_far += 1
            return us * 1.01**runs_so_far

        return once

    found = steady_medians_us({"short": takes(10.0), "long": takes(40.0)}, takes(20.0), 9)
    assert found["long"] / found["short"] == pytest.approx(4.0, rel=1e-3)
    assert 20.0 < found["long"] / 2 < 20.0 * 1.01**runs_so_far, "at the speed it mostly had"


def test_refuses_to_measure_nothing() -> None:
    with pytest.raises(InputError, match="must all be >= 1"):
        time_experts(64, 64, tokens_per_expert=(0,))


def _run(script: str, *arguments: str) -> dict[str, object]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.slow
def test_the_gpu_script_walks_through_without_a_gpu() -> None:
    pytest.importorskip("triton")
    result = _run("kernels_gpu.py", "--rehearse", "--json")
    checks = result["checks"]
    assert isinstance(checks, dict)
    assert {name: check["holds"] for name, check in checks.items()} == dict.fromkeys(
        ("oracle", "plans", "batches", "nan"), True
    )


@pytest.mark.slow
def test_the_benchmark_says_when_no_gpu_was_measured() -> None:
    gpu = _run("kernels.py", "--json", "--only", "gpu")["gpu"]
    assert isinstance(gpu, dict)
    assert (gpu["results"] is None) == (gpu["holds"] is None) == ("reason" in gpu)
