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
# Registers a thread may use. The widest up blocks and what is loaded element by element fill all
# that there are; their bound is that nothing spills.
MOST_REGISTERS = {
    "up_swiglu": 255,
    "down_scatter": 168,
    "route": 144,
    "scan_blocks": 80,
    "scan": 80,
    "place": 128,
    "reduce": 64,
    "clear_tail": 40,
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


def _most_registers(build: dict[str, Any]) -> int:
    rows = build["constants"].get("BLOCK_ROWS", 0)
    if build["kernel"] not in PRODUCTS or not build["aligned"] or build["float_type"] == "fp32":
        return MOST_REGISTERS[build["kernel"]] if build["kernel"] not in PRODUCTS else 255
    if build["kernel"] == "up_swiglu" and rows < 128:
        return 176  # gpt-oss's activation with biases; the others stay below 128
    return MOST_REGISTERS[build["kernel"]]


def _assert_as_meant(build: dict[str, Any]) -> None:
    assert build["spills"] == 0, build
    assert build["registers"] <= _most_registers(build), build
    assert build["shared_bytes"] <= SHARED_BYTES, build
    if build["kernel"] not in PRODUCTS:
        assert build["warp_group_products"] == 0, build
    elif build["float_type"] == "fp32":
        # No tf32, and no chain of products longer than one block of depth.
        assert build["warp_group_products"] == build["warp_products"] == 0, build
        assert build["chained_products"] == 0, build
    else:
        # Hopper's own matrix instruction at every block size, also for a handful of tokens.
        assert build["warp_group_products"] > 0 and build["warp_products"] == 0, build
        assert (build["asynchronous_copies"] > 0) == build["aligned"], build


SCRIPT = """
import json
from dataclasses import asdict
from loadmaster.kernels.compile_check import compile_launch, product_launches
from loadmaster.kernels.tile_configs import default_tiles, fit_tiles
few = default_tiles(16)
smallest = fit_tiles(few, 2, aligned=False)
launches = [
    next(product_launches(few)),
    next(product_launches(smallest, even=False, aligned=False, hidden=1, intermediate=1)),
    *product_launches(fit_tiles(few, 4), float_type="fp32"),
]
print("\\n".join(json.dumps(asdict(compile_launch(one))) for one in launches))
"""


def test_decode_blocks_sizes_of_one_and_float32(tmp_path: Path) -> None:
    builds = _builds(tmp_path, f"-c {SCRIPT}")
    kernels = [build["kernel"] for build in builds]
    assert kernels == ["up_swiglu", "up_swiglu", "up_swiglu", "down_scatter"]
    for build in builds:
        _assert_as_meant(build)


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    builds = _builds(tmp_path, "-m loadmaster.kernels.compile_check")
    assert {build["kernel"] for build in builds} == set(MOST_REGISTERS)
    for build in builds:
        _assert_as_meant(build)
