"""Compile every Triton kernel for Hopper without a GPU and read what the machine code says.

`python -m loadmaster.kernels.compile_check` prints one JSON record per build: registers, shared
memory, matrix instructions, spills. Uses the disassembler that ships with Triton. Must run in a
process of its own where TRITON_INTERPRET is not set: an interpreted kernel cannot be compiled.
Knows nothing of tensors or launches.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_product_kernels, triton_routing_kernels
from .tile_configs import GROUP_TILES, Tile, Tiles, default_tiles, fit_tiles, tuned_tiles

HOPPER = GPUTarget("cuda", 90, 32)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INTEGERS = "*i32"
# Argument types by name; what is not here is an int32 array.
_ARGUMENT_TYPES = {
    **dict.fromkeys(("x", "weights", "biases", "act", "y", "out", "logits"), "*{float}"),
    **dict.fromkeys(("tokens", "experts", "blocks", "segments", "row_limit"), "i32"),
    **dict.fromkeys(("hidden", "intermediate"), "i32"),
    **dict.fromkeys(("stride_x", "stride_y", "stride_out", "stride_logits"), "i64"),
    **dict.fromkeys(("limit", "alpha"), "fp32"),
    "gates": "*fp32",
    "load": "*i64",
}
# Sizes and strides a launch finds divisible by 16, as it does for pointers.
_DIVISIBLE = ("hidden", "intermediate", "stride_x", "stride_y", "stride_out", "stride_logits")


@dataclass(frozen=True)
class Build:
    """One compiled kernel and its machine code in numbers."""

    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    shared_bytes: int
    warp_group_products: int  # HGMMA: Hopper's matrix instruction
    warp_products: int  # HMMA: the older one
    asynchronous_copies: int  # LDGSTS
    spills: int  # LDL and STL: registers that went to memory


def compile_kernel(
    name: str, constants: dict[str, Any], warps: int, stages: int, float_type: str = "bf16"
) -> Build:
    """Compile one kernel for sm_90 and read its machine code."""
    routing = hasattr(triton_routing_kernels, name)
    function = getattr(triton_routing_kernels if routing else triton_product_kernels, name)
    signature = {
        argument: "constexpr"
        if argument in constants
        else _ARGUMENT_TYPES.get(argument, _INTEGERS).format(float=float_type)
        for argument in function.arg_names
    }
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in _DIVISIBLE
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=HOPPER,
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    registers, code = _read_machine_code(compiled.asm["cubin"])
    return Build(
        kernel=name,
        constants=constants,
        warps=warps,
        stages=stages,
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        warp_group_products=len(re.findall(r"\bHGMMA\b", code)),
        warp_products=len(re.findall(r"\bHMMA\b", code)),
        asynchronous_copies=len(re.findall(r"\bLDGSTS\b", code)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
    )


def product_builds(tiles: Tiles, kind: str = "silu", bias: bool = False) -> Iterator[Build]:
    """Both products with the given blocks, as the layer launches them."""
    common: dict[str, Any] = {"HAS_BIAS": bias, "EVEN": True, "UPCAST": False, "PRECISION": "ieee"}
    common["GROUP"] = GROUP_TILES
    up = {"K": 8, "KIND": kind, "GATHER": True, **common, **_blocks(tiles.up)}
    yield compile_kernel("up_swiglu", up, tiles.up.warps, tiles.up.stages)
    down = {"SCATTER": True, **common, **_blocks(tiles.down)}
    yield compile_kernel("down_scatter", down, tiles.down.warps, tiles.down.stages)


def routing_builds(experts: int, block_tokens: int, block_tiles: int) -> Iterator[Build]:
    """Everything beside the products, for one padded number of experts."""
    route = {"K": 8, "KP": 8, "EP": experts, "BLOCK_T": block_tokens, "RECORD": True}
    for from_logits in (True, False):
        choice = {"FROM_LOGITS": from_logits, "NORMALIZE": True}
        yield compile_kernel("route", route | choice, 8, 3)
    yield compile_kernel("scan_blocks", {"EP": experts, "BLOCK_B": 128, "BLOCK_E": 16}, 4, 3)
    scan = {"EP": experts, "SP": experts, "BLOCK_ROWS": 64, "BLOCK_TILES": block_tiles}
    for quotas in (True, False):
        yield compile_kernel("scan", scan | {"HAS_QUOTAS": quotas, "RECORD": True}, 4, 3)
    place = {"K": 8, "EP": experts, "BLOCK_T": block_tokens, "ONE_BLOCK": False}
    yield compile_kernel("place", place, 8, 3)
    yield compile_kernel("reduce", {"K": 8, "BLOCK_H": 1024}, 4, 3)


def all_builds() -> Iterator[Build]:
    """Every kernel with every block size in use, and the two odd activations."""
    in_use = [default_tiles(rows) for rows in (16, 32, 64, 128)]
    in_use += [tiles for _, tiles in tuned_tiles()]
    for tiles in dict.fromkeys(fit_tiles(tiles, 2) for tiles in in_use):
        yield from product_builds(tiles)
    for kind in triton_product_kernels.ACTIVATIONS[1:]:
        yield from product_builds(default_tiles(64), kind, bias=kind == "gptoss_clamped")
    yield from routing_builds(128, 32, 32)
    yield from routing_builds(512, 8, 8)


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


if __name__ == "__main__":
    for build in all_builds():
        sys.stdout.write(json.dumps(asdict(build)) + "\n")
