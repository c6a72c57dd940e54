"""Compile every Triton kernel for Hopper without a GPU and read what the machine code says.

`python benchmarks/kernels_compile.py` prints one JSON record per build: registers, shared
memory, matrix instructions, spills, and what of it is not as meant; then it exits with 1. Uses the
disassembler that ships with Triton. Must run in a process of its own where TRITON_INTERPRET is not
set: an interpreted kernel cannot be compiled. Knows nothing of tensors or launches.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loadmaster.kernels.activation import ActivationKind
from loadmaster.kernels.gpu import product_kernels
from loadmaster.kernels.gpu.tile_sizes import (
    GROUP_TILES,
    Tile,
    TileKey,
    Tiles,
    default_tiles,
    fit_tiles,
    spread_tiles,
    tuned_tiles,
)

HOPPER = GPUTarget("cuda", 90, 32)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INTEGERS = "*i32"
# Argument types by name; what is not here is an int32 array.
_ARGUMENT_TYPES = {
    **dict.fromkeys(("x", "weights", "biases", "act", "y", "out"), "*{float}"),
    **dict.fromkeys(("rows", "hidden", "intermediate"), "i32"),
    **dict.fromkeys(("stride_x", "stride_y", "stride_out"), "i64"),
    **dict.fromkeys(("limit", "alpha"), "fp32"),
    "gates": "*fp32",
    "where": "*i64",
}
# Sizes and strides a launch finds divisible by 16, as it does for pointers.
_DIVISIBLE = ("hidden", "intermediate", "stride_x", "stride_y", "stride_out")
_PRODUCTS = ("up_gated", "down")
# Registers a thread may use. The widest up blocks and what is loaded element by element fill all
# that there are; their bound is that nothing spills.
MOST_REGISTERS = {"up_gated": 255, "down": 168, "reduce": 64}
_MOST_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True)
class Build:
    """One compiled kernel and its machine code in numbers."""

    kernel: str
    float_type: str
    aligned: bool  # sizes and strides are multiples of 16
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    shared_bytes: int
    warp_group_products: int  # HGMMA: Hopper's matrix instruction
    warp_products: int  # HMMA: the older one
    asynchronous_copies: int  # LDGSTS
    spills: int  # LDL and STL: registers that went to memory
    chained_products: int  # products that go on from an earlier block's sum


def faults(build: Build) -> list[str]:
    """What in the machine code is not as meant; nothing where all is."""
    meant = {
        "no spills": build.spills == 0,
        f"registers <= {most_registers(build)}": build.registers <= most_registers(build),
        f"shared memory <= {_MOST_SHARED_BYTES}": build.shared_bytes <= _MOST_SHARED_BYTES,
    }
    if build.kernel not in _PRODUCTS:
        meant["no matrix instructions"] = build.warp_group_products == 0
    elif build.float_type == "fp32":
        meant["no tf32"] = build.warp_group_products == build.warp_products == 0
        meant["no sum longer than one block of depth"] = build.chained_products == 0
    else:
        # At every block size, also for a handful of tokens.
        meant["Hopper's own matrix instruction"] = build.warp_group_products > 0
        meant["no older matrix instruction"] = build.warp_products == 0
        meant["asynchronous copies where sizes are aligned, only there"] = (
            (build.asynchronous_copies > 0) == build.aligned
        )
    return [what for what, holds in meant.items() if not holds]


def most_registers(build: Build) -> int:
    """Registers per thread that this build may use."""
    if build.kernel not in _PRODUCTS:
        return MOST_REGISTERS[build.kernel]
    if not build.aligned or build.float_type == "fp32":
        return 255
    if build.kernel == "up_gated" and build.constants["BLOCK_ROWS"] < 128:
        return 176  # gpt-oss's activation with biases; the others stay below 128
    return MOST_REGISTERS[build.kernel]


class Launch(NamedTuple):
    """What a kernel is compiled for. aligned: sizes and strides are multiples of 16."""

    name: str
    constants: dict[str, Any]
    warps: int
    stages: int
    float_type: str = "bf16"
    aligned: bool = True


def compile_launch(launch: Launch) -> Build:
    """Compile one kernel for sm_90 and read its machine code."""
    name, constants, warps, stages, float_type, aligned = launch
    function = getattr(product_kernels, name)
    signature = {
        argument: "constexpr"
        if argument in constants
        else _ARGUMENT_TYPES.get(argument, _INTEGERS).format(float=float_type)
        for argument in function.arg_names
    }
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or (aligned and argument in _DIVISIBLE and kind != "constexpr")
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=HOPPER,
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    registers, code = _read_machine_code(compiled.asm["cubin"])
    return Build(
        kernel=name,
        float_type=float_type,
        aligned=aligned,
        constants=constants,
        warps=warps,
        stages=stages,
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        warp_group_products=len(re.findall(r"\bHGMMA\b", code)),
        warp_products=len(re.findall(r"\bHMMA\b", code)),
        asynchronous_copies=len(re.findall(r"\bLDGSTS\b", code)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        chained_products=_chained_products(compiled.asm["ttir"]),
    )


def product_launches(
    tiles: Tiles,
    kind: str = "silu",
    bias: bool = False,
    *,
    even: bool = True,
    float_type: str = "bf16",
    aligned: bool = True,
    **sizes: int,
) -> Iterator[Launch]:
    """Both products with the given blocks, as `backend.py` launches them.

    even: sizes are multiples of the depth. sizes: hidden or intermediate of 1, which Triton
    compiles in.
    """
    common: dict[str, Any] = {"HAS_BIAS": bias, "EVEN": even, "UPCAST": False}
    common |= {"PRECISION": "ieee", "GROUP": GROUP_TILES, **sizes}
    up = {"KIND": kind, **common, **_blocks(tiles.up)}
    yield Launch("up_gated", up, tiles.up.warps, tiles.up.stages, float_type, aligned)
    down = {**common, **_blocks(tiles.down)}
    yield Launch("down", down, tiles.down.warps, tiles.down.stages, float_type, aligned)


def all_launches() -> Iterator[Launch]:
    """Every kernel with every block size in use, and what else a launch may ask of it."""
    usual = [default_tiles(rows) for rows in (16, 32, 64, 128)]
    idle = TileKey("", "", "", 1, 1, active_experts=1, rows_p90=1)
    in_use = usual + [spread_tiles(tiles, idle) for tiles in usual]
    in_use += [tiles for _, tiles in tuned_tiles()]
    for tiles in dict.fromkeys(fit_tiles(tiles, 2) for tiles in in_use):
        yield from product_launches(tiles)
    for tiles in (usual[0], usual[-1]):
        yield from product_launches(fit_tiles(tiles, 2), float_type="fp16")
        yield from product_launches(fit_tiles(tiles, 2), even=False)
    for bits, float_type in ((2, "bf16"), (4, "fp32")):
        for tiles in dict.fromkeys(fit_tiles(tiles, bits, aligned=False) for tiles in in_use):
            yield from product_launches(tiles, even=False, float_type=float_type, aligned=False)
    for tiles in dict.fromkeys(fit_tiles(tiles, 4) for tiles in in_use):
        yield from product_launches(tiles, float_type="fp32")
    smallest = fit_tiles(usual[0], 2, aligned=False)
    yield from product_launches(smallest, even=False, aligned=False, hidden=1, intermediate=1)
    for kind in get_args(ActivationKind)[1:]:
        yield from product_launches(default_tiles(64), kind, bias=kind == "gptoss_clamped")
    yield Launch("reduce", {"K": 8, "BLOCK_H": 1024}, 4, 3)


def all_builds() -> Iterator[Build]:
    """Every launch compiled, in order, on all cores: each takes seconds."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        yield from pool.map(compile_launch, all_launches())


def _chained_products(code: str) -> int:
    """Products in Triton's own code whose accumulator is not a constant zero."""
    constants = set(re.findall(r"(%\S+) = arith\.constant dense<0\.0", code))
    totals = re.findall(r"tt\.dot %\S+, %\S+, (%[\w.]+)", code)
    return sum(total not in constants for total in totals)


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_ROWS": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}


def _read_machine_code(cubin: bytes) -> tuple[int, str]:
    """Registers per thread, and the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", file.name)
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no register count: {usage!r}")
    return int(found.group(1)), code


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Print every build; 1 where one is not as meant."""
    wrong = 0
    for build in all_builds():
        found = faults(build)
        wrong += bool(found)
        sys.stdout.write(json.dumps(asdict(build) | {"faults": found}) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
