"""Search block sizes on this device and write kernels/gpu/tile_configs.json.

For a few histograms (active experts, rows per expert) every candidate that fits is checked
against the default blocks bit for bit, then timed; the fastest is kept. Entries of other devices
stay. Knows nothing of targets.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from kernels_gpu_layers import Layers, draw_logits
from kernels_gpu_shapes import Shape, median_us
from rank_layer import choose_experts, count_tokens, rank_layer

from loadmaster.kernels.gpu import backend
from loadmaster.kernels.gpu.tile_sizes import (
    SHARED_BYTES,
    Tile,
    TileKey,
    Tiles,
    default_tiles,
    rows_percentile,
    save_tiles,
    tuned_tiles,
)

TOKENS = (16, 128, 512, 2048, 8192, 32768)
KINDS = ("uniform", "zipf")


def tune(shape: Shape, device: torch.device) -> None:
    """Tune every histogram of TOKENS x KINDS; rewrite this device's entries."""
    layers = Layers(shape, device)
    name = torch.cuda.get_device_name(device)
    tuned = []
    for tokens, kind in itertools.product(TOKENS, KINDS):
        logits = draw_logits(shape, tokens, kind, None, device)
        gate, ids = choose_experts(logits, shape.choices)
        active, rows_p90 = rows_percentile(count_tokens(ids, shape.experts).tolist())
        key = TileKey(
            name, triton.__version__, "bfloat16", shape.hidden, shape.intermediate, active, rows_p90
        )
        print(f"tuning {tokens} tokens, {kind} ...", file=sys.stderr)
        tuned.append((key, _fastest(layers, ids, gate, rows_p90, device)))
    kept = [entry for entry in tuned_tiles() if entry[0].device != name]
    save_tiles(kept + tuned, f"{name}, triton {triton.__version__}")


def _fastest(
    layers: Layers, ids: torch.Tensor, gate: torch.Tensor, rows_p90: int, device: torch.device
) -> Tiles:
    """The quickest blocks: first of the up product, then of the down product."""
    x = torch.randn(len(ids), layers.shape.hidden, device=device).bfloat16()
    best = default_tiles(rows_p90)
    step = (x, ids, gate)
    expected = _run(layers, step, best, 0)
    best_us = _time(layers, step, best, device)
    for rows in _row_counts(rows_p90):
        for tiles in _candidates(rows):
            try:
                if not torch.equal(_run(layers, step, tiles, 0), expected):
                    raise SystemExit(f"{tiles} changes bits: block sizes must never do that")
                us = _time(layers, step, tiles, device)
            except triton.runtime.errors.OutOfResources:
                continue
            if us < best_us:
                best, best_us = tiles, us
    return best


def _row_counts(rows_p90: int) -> list[int]:
    """Rows per block worth trying: the power of two at the percentile and its neighbours."""
    middle = min(max(triton.next_power_of_2(max(rows_p90, 1)), 16), 256)
    return sorted({max(middle // 4, 16), max(middle // 2, 16), middle, min(middle * 2, 256)})


def _candidates(rows: int) -> Iterator[Tiles]:
    """About 24 pairs of blocks with one depth, so that every one sums a row alike."""
    for columns, (warps, stages) in itertools.product((64, 128), ((4, 3), (4, 4), (8, 3), (8, 4))):
        up = Tile(rows, columns, 64, warps, stages)
        if rows * columns > 128 * 128 or up.shared_bytes(2, 2) > SHARED_BYTES:
            continue
        for down_columns in (128, 256):
            down = Tile(rows, down_columns, 64, warps, stages)
            if rows * down_columns <= 128 * 256 and down.shared_bytes(1, 2) <= SHARED_BYTES:
                yield Tiles(up, down)


def _run(
    layers: Layers, step: tuple[torch.Tensor, ...], tiles: Tiles, weight_set: int
) -> torch.Tensor:
    x, ids, gate = step
    with mock.patch.object(backend, "choose_tiles", lambda key: tiles):
        return rank_layer(x, ids, gate, layers.ours[weight_set])


def _time(layers: Layers, step: tuple[torch.Tensor, ...], tiles: Tiles, device: Any) -> float:
    runs = [
        lambda weight_set=weight_set: _run(layers, step, tiles, weight_set)
        for weight_set in range(len(layers.ours))
    ]
    return median_us(device, runs, repeats=15)
