"""Which block sizes the Triton products use, from how tokens fall on experts.

Tuned entries come from `tile_configs.json`, written by `benchmarks/kernels_gpu.py --tune` on a
real device and keyed on device, Triton version, dtype, sizes, active experts and the 90th
percentile of rows per active expert; the nearest one is used. Where no entry fits the device,
`default_tiles` answers by rows alone. Nothing is timed at run time. Knows no tensors.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...errors import InputError
from ...foundation.documents import parse_json

TUNED_FILE = Path(__file__).with_name("tile_configs.json")
# What one Hopper multiprocessor holds: shared memory for blocks of threads, and registers.
SHARED_BYTES = 227 * 1024
REGISTERS = 65536
# Tiles of rows that walk all column blocks together (see `_work_item` of the product kernels).
GROUP_TILES = 16
# Multiprocessors of an H100 or H200 (SXM), and the narrowest block its matrix instruction fills.
PROCESSORS = 132
LEAST_COLUMNS = 64
# Sizes that are multiples of this are loaded 16 bytes at a time.
ALIGNED = 16


@dataclass(frozen=True)
class Tile:
    """One product's blocks: rows (tokens) x columns (weights) x depth, warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, weight_tiles: int, element_bytes: int) -> int:
        """Shared memory of all stages; `up_gated` holds two weight tiles, `down` one."""
        per_stage = self.depth * (weight_tiles * self.columns + self.rows) * element_bytes
        return per_stage * self.stages

    def resident(self, weight_tiles: int, element_bytes: int) -> int:
        """Programs one multiprocessor holds at once, by shared memory and registers."""
        threads = 32 * self.warps
        # Accumulators, and about 64 more for addresses and tiles in flight.
        registers = weight_tiles * self.rows * self.columns // threads + 64
        by_shared = SHARED_BYTES // max(self.shared_bytes(weight_tiles, element_bytes), 1)
        return max(min(by_shared, REGISTERS // (threads * registers)), 1)


@dataclass(frozen=True)
class Tiles:
    """The blocks of both products; they share a tile map, so `rows` agree."""

    up: Tile
    down: Tile


@dataclass(frozen=True)
class TileKey:
    """What a tuned entry was tuned for."""

    device: str
    triton: str
    dtype: str
    hidden: int
    intermediate: int
    active_experts: int
    rows_p90: int

    def distance(self, other: TileKey) -> float:
        """How far apart two keys of one device, version and dtype are, in doublings."""
        mine = (self.hidden, self.intermediate, self.active_experts, self.rows_p90)
        theirs = (other.hidden, other.intermediate, other.active_experts, other.rows_p90)
        return sum(
            abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(mine, theirs, strict=True)
        )


def rows_percentile(counts: Iterable[int]) -> tuple[int, int]:
    """(active experts, 90th percentile of the rows of active experts, nearest rank)."""
    active = sorted(count for count in counts if count > 0)
    if not active:
        return 0, 0
    return len(active), active[math.ceil(0.9 * len(active)) - 1]


def default_tiles(rows_p90: int) -> Tiles:
    """Blocks by rows per expert alone, for devices without tuned entries.

    The smallest block of rows that covers the 90th percentile, up to 128: below it weights are
    read once per expert either way, and a larger block only computes padding.
    """
    if rows_p90 <= 16:
        return Tiles(Tile(16, 128, 64, 4, 4), Tile(16, 128, 64, 4, 4))
    if rows_p90 <= 32:
        return Tiles(Tile(32, 128, 64, 4, 4), Tile(32, 128, 64, 4, 4))
    if rows_p90 <= 96:
        return Tiles(Tile(64, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4))
    return Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3))


def spread_tiles(tiles: Tiles, key: TileKey) -> Tiles:
    """Narrow column blocks where wide ones would leave multiprocessors without work.

    Which columns a program computes changes no bit: each is its own chain of products.
    """
    tiles_of_rows = max(key.active_experts, 1) * -(-max(key.rows_p90, 1) // tiles.up.rows)

    def spread(tile: Tile, columns: int) -> Tile:
        idle = tiles_of_rows * -(-columns // tile.columns) < PROCESSORS
        return replace(tile, columns=LEAST_COLUMNS, warps=4) if idle else tile

    return Tiles(spread(tiles.up, key.intermediate), spread(tiles.down, key.hidden))


def fit_tiles(tiles: Tiles, element_bytes: int, *, aligned: bool = True) -> Tiles:
    """The same blocks, fitted to the element size and to what a Hopper SM holds.

    float32 is multiplied from registers, so its blocks are smaller. aligned: both sizes are
    multiples of ALIGNED; elsewhere single elements are loaded through registers, and half the
    depth keeps them there. Depth depends on element size and alignment alone, so a row is summed
    equal in every batch.
    """
    wide = element_bytes == 4
    fitted = []
    for tile, weight_tiles in ((tiles.up, 2), (tiles.down, 1)):
        tile = replace(tile, depth=max(tile.depth * 2 // element_bytes, 16))
        if wide:
            tile = replace(tile, rows=min(tile.rows, 64))
        if not aligned:
            narrow = wide or tile.rows > 64
            tile = replace(
                tile,
                depth=min(tile.depth, 32),
                columns=LEAST_COLUMNS if narrow else tile.columns,
                warps=8 if wide or tile.rows >= 64 else tile.warps,
            )
        while tile.stages > 1 and tile.shared_bytes(weight_tiles, element_bytes) > SHARED_BYTES:
            tile = replace(tile, stages=tile.stages - 1)
        fitted.append(tile)
    return Tiles(*fitted)


def choose_tiles(key: TileKey) -> Tiles:
    """The nearest tuned entry of this device, Triton version and dtype; else the default."""
    entries = [
        (entry_key, tiles)
        for entry_key, tiles in tuned_tiles()
        if (entry_key.device, entry_key.triton, entry_key.dtype)
        == (key.device, key.triton, key.dtype)
    ]
    if not entries:
        return spread_tiles(default_tiles(key.rows_p90), key)
    return min(entries, key=lambda entry: entry[0].distance(key))[1]


@functools.cache
def tuned_tiles() -> tuple[tuple[TileKey, Tiles], ...]:
    """The entries of the tuned file, in its order."""
    if not TUNED_FILE.exists():
        return ()
    return parse_tiles(TUNED_FILE.read_text())


def save_tiles(entries: Sequence[tuple[TileKey, Tiles]], measured_on: str) -> None:
    """Write the tuned file; what this process chooses from now on comes from it."""
    text = format_tiles(entries, measured_on)
    parse_tiles(text)
    TUNED_FILE.write_text(text)
    tuned_tiles.cache_clear()


def parse_tiles(text: str) -> tuple[tuple[TileKey, Tiles], ...]:
    """Read what `format_tiles` wrote.

    Raises InputError where both products do not cut the same rows (they share a tile map), or
    where entries of one device, Triton version and dtype differ in depth: a row's bits would then
    depend on its batch.
    """
    entries = tuple(
        (TileKey(**entry["key"]), Tiles(Tile(*entry["up"]), Tile(*entry["down"])))
        for entry in parse_json(text, "tuned blocks")["entries"]
    )
    depths: dict[tuple[str, str, str], int] = {}
    for key, tiles in entries:
        if tiles.up.rows != tiles.down.rows:
            raise InputError(
                f"tuned blocks of {key}: up cuts {tiles.up.rows} rows and down "
                f"{tiles.down.rows}; both must cut the same"
            )
        depth = depths.setdefault((key.device, key.triton, key.dtype), tiles.up.depth)
        if {tiles.up.depth, tiles.down.depth} != {depth}:
            raise InputError(
                f"tuned blocks of {key}: depths {tiles.up.depth} and {tiles.down.depth} beside "
                f"{depth}; one device and dtype has one depth"
            )
    return entries


def format_tiles(entries: Sequence[tuple[TileKey, Tiles]], measured_on: str) -> str:
    """The tuned file's text; `measured_on` says on what machine and when."""
    listed = [
        {
            "key": asdict(key),
            "up": list(asdict(tiles.up).values()),
            "down": list(asdict(tiles.down).values()),
        }
        for key, tiles in entries
    ]
    return json.dumps({"measured_on": measured_on, "entries": listed}, indent=1) + "\n"
