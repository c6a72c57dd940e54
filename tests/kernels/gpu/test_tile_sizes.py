"""Blocks come from the histogram and from what was tuned, never from a run-time search."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.kernels.gpu import tile_sizes
from loadmaster.kernels.gpu.tile_sizes import (
    SHARED_BYTES,
    Tile,
    TileKey,
    Tiles,
    choose_tiles,
    default_tiles,
    fit_tiles,
    format_tiles,
    parse_tiles,
    rows_percentile,
    save_tiles,
)

H100 = TileKey("H100", "3.9.0", "bfloat16", 2048, 768, 128, 256)
SMALL = Tiles(Tile(16, 64, 64, 4, 4), Tile(16, 64, 64, 4, 4))
LARGE = Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], (0, 0)),
        ([0, 0], (0, 0)),
        ([5], (1, 5)),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1000], (10, 9)),
        ([4096, 1, 1, 1], (4, 4096)),
    ],
)
def test_percentile_looks_at_active_experts(counts: list[int], expected: tuple[int, int]) -> None:
    assert rows_percentile(counts) == expected


def test_default_blocks_grow_with_rows() -> None:
    assert [default_tiles(rows).up.rows for rows in (1, 16, 17, 40, 96, 97, 5000)] == [
        16,
        16,
        32,
        64,
        64,
        128,
        128,
    ]


def test_a_multiprocessor_holds_what_memory_and_registers_allow() -> None:
    """Two down programs overlap one's writing with the other's products; up fills a processor."""
    prefill, decode = default_tiles(256), default_tiles(1)
    assert prefill.up.resident(2, 2) == 1
    assert prefill.down.resident(1, 2) == 2
    assert decode.up.resident(2, 2) == 1
    assert decode.down.resident(1, 2) == 3


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4]))
def test_fitted_blocks_fit_and_keep_one_depth(rows: int, element_bytes: int) -> None:
    tiles = fit_tiles(default_tiles(rows), element_bytes)
    assert tiles.up.rows == tiles.down.rows
    assert tiles.up.depth == tiles.down.depth == 128 // element_bytes
    askew = fit_tiles(default_tiles(rows), element_bytes, aligned=False)
    assert askew.up.rows == askew.down.rows and askew.up.depth == askew.down.depth == 32
    assert tiles.up.shared_bytes(2, element_bytes) <= SHARED_BYTES
    assert tiles.down.shared_bytes(1, element_bytes) <= SHARED_BYTES


def test_the_nearest_tuned_entry_of_the_same_device_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    few = TileKey("H100", "3.9.0", "bfloat16", 2048, 768, 128, 4)
    entries = [(H100, LARGE), (few, SMALL)]
    text = format_tiles(entries, "one H100, by hand")
    assert list(parse_tiles(text)) == entries
    monkeypatch.setattr(tile_sizes, "tuned_tiles", lambda: parse_tiles(text))
    near = TileKey("H100", "3.9.0", "bfloat16", 2048, 768, 120, 6)
    assert choose_tiles(near) == SMALL
    assert choose_tiles(TileKey("H100", "3.9.0", "bfloat16", 1024, 768, 128, 700)) == LARGE
    for other in ("H200", "3.6.0", "float16"):
        key = TileKey(
            other if other == "H200" else "H100",
            other if other == "3.6.0" else "3.9.0",
            other if other == "float16" else "bfloat16",
            2048,
            768,
            120,
            6,
        )
        assert choose_tiles(key) == default_tiles(6)


def test_few_tiles_are_spread_over_more_programs() -> None:
    """One token of eight experts: 48 wide column blocks would leave 84 processors idle."""
    one = replace(H100, active_experts=8, rows_p90=1)
    tiles = choose_tiles(one)
    assert (tiles.up.columns, tiles.down.columns) == (64, 64)
    assert (tiles.up.warps, tiles.up.rows, tiles.up.depth) == (4, 16, 64)
    many = replace(H100, active_experts=128, rows_p90=4)
    assert choose_tiles(many) == default_tiles(4)


def test_tuned_blocks_serve_the_process_that_wrote_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiles.json"
    monkeypatch.setattr(tile_sizes, "TUNED_FILE", file)
    tile_sizes.tuned_tiles.cache_clear()
    assert choose_tiles(H100) == default_tiles(256)
    save_tiles([(H100, LARGE)], "by hand")
    assert choose_tiles(H100) == LARGE
    monkeypatch.undo()
    tile_sizes.tuned_tiles.cache_clear()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(H100, Tiles(LARGE.up, SMALL.down))], "up cuts 128 rows and down 16"),
        ([(H100, Tiles(LARGE.up, replace(LARGE.down, depth=32)))], "depths 64 and 32 beside 64"),
        (
            [(H100, LARGE), (H100, Tiles(*(replace(t, depth=32) for t in (SMALL.up, SMALL.down))))],
            "depths 32 and 32 beside 64",
        ),
    ],
)
def test_refuses_tuned_blocks_that_would_change_bits(
    entries: list[tuple[TileKey, Tiles]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse_tiles(format_tiles(entries, "by hand"))
