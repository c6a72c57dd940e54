"""Every Triton kernel compiles for Hopper, and the machine code is what was meant."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.kernels_compile import MOST_REGISTERS, Build, faults

ROOT = Path(__file__).resolve().parents[3]

GOOD = Build(
    kernel="down", float_type="bf16", aligned=True, constants={"BLOCK_ROWS": 64},
    warps=4, stages=3, registers=120, shared_bytes=100_000, warp_group_products=8,
    warp_products=0, asynchronous_copies=12, spills=0, chained_products=1,
)


def _builds(tmp_path: Path, command: str) -> list[dict[str, Any]]:
    """Compile in a process of its own: here Triton is set to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, *command.split(" ", 1)],
        env=environment,
        cwd=ROOT,                     # whence `benchmarks` is found
        capture_output=True,
        text=True,
        check=False,
    )
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [b for b in builds if b["faults"]] or done.stderr[-2000:]
    return builds


SCRIPT = """
import json
from dataclasses import asdict
from benchmarks.kernels_compile import compile_launch, faults, product_launches
from loadmaster.kernels.gpu.tile_sizes import default_tiles, fit_tiles
few = default_tiles(16)
smallest = fit_tiles(few, 2, aligned=False)
launches = [
    next(product_launches(few)),
    next(product_launches(smallest, even=False, aligned=False, hidden=1, intermediate=1)),
    *product_launches(fit_tiles(few, 4), float_type="fp32"),
]
builds = [compile_launch(one) for one in launches]
print("\\n".join(json.dumps(asdict(one) | {"faults": faults(one)}) for one in builds))
"""


def test_decode_blocks_sizes_of_one_and_float32(tmp_path: Path) -> None:
    builds = _builds(tmp_path, f"-c {SCRIPT}")
    kernels = [build["kernel"] for build in builds]
    assert kernels == ["up_gated", "up_gated", "up_gated", "down"]
    assert [build["faults"] for build in builds] == [[]] * 4
    assert all(build["warp_group_products"] for build in builds[:2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 2}, "no spills"),
        ({"registers": 250}, "registers <= 168"),
        ({"shared_bytes": 240_000}, "shared memory <= 232448"),
        ({"warp_group_products": 0, "warp_products": 16}, "Hopper's own matrix instruction"),
        ({"asynchronous_copies": 0}, "asynchronous copies where sizes are aligned, only there"),
        ({"float_type": "fp32"}, "no tf32"),
        ({"kernel": "reduce", "registers": 60}, "no matrix instructions"),
    ],
)
def test_machine_code_that_is_not_as_meant_is_said(change: dict[str, Any], said: str) -> None:
    assert faults(GOOD) == []
    assert said in faults(dataclasses.replace(GOOD, **change))


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    builds = _builds(tmp_path, "-m benchmarks.kernels_compile")
    assert {build["kernel"] for build in builds} == set(MOST_REGISTERS)
    assert {str(build): build["faults"] for build in builds if build["faults"]} == {}
