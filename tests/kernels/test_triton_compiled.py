"""Every Triton kernel compiles for Hopper, and the machine code is what was meant."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED_BYTES = 227 * 1024
# Registers a thread may use; two warps' worth of accumulators fill the widest tiles.
MOST_REGISTERS = {
    "up_swiglu": 255,
    "down_scatter": 168,
    "route": 168,
    "scan_blocks": 96,
    "scan": 96,
    "place": 128,
    "reduce": 64,
}
PRODUCTS = ("up_swiglu", "down_scatter")


def _builds(tmp_path: Path, command: str) -> list[dict[str, Any]]:
    """Compile in a process of its own: here Triton is set to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, *command.split(" ", 1)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _assert_as_meant(build: dict[str, Any]) -> None:
    assert build["spills"] == 0, build
    assert build["registers"] <= MOST_REGISTERS[build["kernel"]], build
    assert build["shared_bytes"] <= SHARED_BYTES, build
    if build["kernel"] in PRODUCTS:
        # Hopper's own matrix instruction at every block size, also for a handful of tokens.
        assert build["warp_group_products"] > 0 and build["warp_products"] == 0, build
        assert build["asynchronous_copies"] > 0, build
    else:
        assert build["warp_group_products"] == 0, build


def test_decode_blocks_use_hoppers_matrix_instruction(tmp_path: Path) -> None:
    script = (
        "import json\n"
        "from dataclasses import asdict\n"
        "from loadmaster.kernels.compile_check import product_builds\n"
        "from loadmaster.kernels.tile_configs import default_tiles\n"
        "print(json.dumps(asdict(next(product_builds(default_tiles(16))))))\n"
    )
    builds = _builds(tmp_path, f"-c {script}")
    assert [build["kernel"] for build in builds] == ["up_swiglu"]
    _assert_as_meant(builds[0])


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    builds = _builds(tmp_path, "-m loadmaster.kernels.compile_check")
    assert {build["kernel"] for build in builds} == set(MOST_REGISTERS)
    for build in builds:
        _assert_as_meant(build)
