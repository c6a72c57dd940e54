"""The Triton kernels stay inside their arrays whatever counts, quotas, ids and rows say.

On a GPU none of these is read back, so nothing but the kernels themselves can hold them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.oracles.expert_layer import relative_error
from loadmaster.errors import InputError
from loadmaster.kernels.gpu.backend import INTERPRETED, TritonSlots, clear_tail, reduce_rows
from loadmaster.kernels.gpu.routing import TileMap, padded_size
from loadmaster.kernels.grouped import LoadRecord, moe_layer, moe_layer_from_logits
from loadmaster.kernels.routing import histogram, route
from loadmaster.kernels.segment_table import DispatchTable

Maker = Callable[..., Any]

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton was imported for a GPU")
MOST = 2**31 - 1


def _backend(layer: Any, slots: int) -> TritonSlots:
    backend = layer.weights("triton", [0] * slots)._backend
    assert isinstance(backend, TritonSlots)
    return backend


def _assert_inside(tiles: TileMap, rows: int) -> None:
    """Segments are disjoint and in order, and every tile starts inside the rows."""
    ends = tiles.row_end[: len(tiles.segment_slot)].tolist()
    assert ends == sorted(ends) and all(0 <= end <= rows for end in ends)
    count = int(tiles.tile_count)
    assert 0 <= count <= tiles.most_tiles
    assert all(0 <= row < rows for row in tiles.tile_row[:count].tolist())


@pytest.mark.parametrize(
    "totals", [[MOST, MOST, MOST], [MOST, MOST - 4, 3], [5, MOST, 5], [-MOST, 3, MOST]]
)
def test_totals_that_would_wrap_stay_inside(totals: list[int], layer_of: Maker) -> None:
    backend = _backend(layer_of(1, 16, 16), 3)
    padded = torch.zeros(padded_size(3), dtype=torch.int32)
    padded[:3] = torch.tensor(totals)
    tiles, start = backend._router.scan(padded, 5, backend._identity, None, None)
    _assert_inside(tiles, 5)
    assert all(0 <= first <= 5 for first in start.tolist())


@pytest.mark.parametrize("quota", [[MOST] * 4, [MOST, MOST - 99, 0, 0], [3, MOST, MOST, -MOST]])
@pytest.mark.parametrize("placed", [[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
def test_quotas_that_would_wrap_lose_no_row(
    quota: list[int], placed: list[int], layer_of: Maker
) -> None:
    backend = _backend(layer_of(1, 16, 16), 4)
    table = DispatchTable(placed, torch.device("cpu"))
    totals = torch.zeros(padded_size(table.experts), dtype=torch.int32)
    totals[: table.experts] = torch.tensor([5, 3])[: table.experts]
    given = torch.tensor(quota, dtype=torch.int32)
    rows = int(totals.sum())
    tiles, _ = backend._router.scan(totals, rows, table, given, None)
    _assert_inside(tiles, rows)
    ends = tiles.row_end[: len(tiles.segment_slot)]
    assert int(ends.max()) == rows, "an expert's last segment takes the rest"


def test_counts_and_quotas_are_capped_before_they_are_narrowed(
    layer_of: Maker, rows_of: Maker
) -> None:
    """2**32 + 2 is 2 in 32 bits: a lie that would fit."""
    layer, x = layer_of(3, 16, 16), rows_of(6, 16, torch.float32)
    backend = layer.weights("triton")._backend
    assert isinstance(backend, TritonSlots)
    out = torch.full_like(x, float("nan"))
    backend.run(x, torch.tensor([2**32 + 2, 2, 2]), out)
    assert relative_error(out, layer.oracle_rows(x, [0] * 6)) <= 1e-6
    weights = layer.weights("triton", [0, 1, 2, 0])
    table = DispatchTable([0, 1, 2, 0], torch.device("cpu"))
    logits = torch.zeros(6, 3)
    single = moe_layer_from_logits(x, logits, layer.weights("triton"), k=1, normalize=True)
    record = LoadRecord(3, 4, "cpu")
    out = moe_layer_from_logits(
        x, logits, weights, k=1, normalize=True, table=table, record=record,
        quota_S=torch.tensor([2**32 + 2, 0, 0, 4]),
    )
    assert torch.equal(out, single)
    assert record.physical_S.tolist() == [6, 0, 0, 0]


def test_ids_are_compared_before_they_are_narrowed(layer_of: Maker, rows_of: Maker) -> None:
    """-2**32 + 1 is 1 in 32 bits; it names nobody."""
    layer, x = layer_of(3, 16, 16), rows_of(5, 16, torch.float32)
    ids, gate = torch.full((5, 1), -(2**32) + 1), torch.ones(5, 1)
    ids[4] = 2
    for backend in ("triton", "torch"):
        out = moe_layer(x, ids, gate, layer.weights(backend))
        assert (out[:4] == 0).all() and (out[4] != 0).any()


def test_narrow_ids_are_not_taken_for_others(layer_of: Maker, rows_of: Maker) -> None:
    layer, x = layer_of(5, 16, 16), rows_of(9, 16, torch.float32)
    ids = torch.tensor([[e % 6] for e in range(9)])
    weights, gate = layer.weights("triton"), torch.ones(9, 1)
    want = moe_layer(x, ids, gate, weights)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(moe_layer(x, ids.to(dtype), gate, weights), want)


def test_reduce_reads_no_row_past_y(rows_of: Maker) -> None:
    memory = rows_of(8, 16, torch.float32)
    where = torch.tensor([[0, 3], [4, 1], [2**31 - 1, 2]])
    out = torch.full((3, 16), float("nan"))
    reduce_rows(memory[:4], where, torch.ones(3, 2), out)
    want = torch.stack((memory[0] + memory[3], memory[1], memory[2]))
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("end", [0, 1, 63, 64, 65, 129, 130])
def test_rows_that_no_count_reaches_are_zero(end: int) -> None:
    y = torch.full((132, 33), 7.0)
    clear_tail(y[:130], torch.tensor([0, end], dtype=torch.int32))
    assert (y[:end] == 7.0).all() and (y[end:130] == 0.0).all() and (y[130:] == 7.0).all()


@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (1, 17), (16, 1)])
def test_sizes_of_one(hidden: int, intermediate: int, layer_of: Maker, rows_of: Maker) -> None:
    layer, x = layer_of(2, hidden, intermediate), rows_of(5, hidden, torch.float32)
    ids, gate = torch.tensor([[0], [1], [1], [0], [1]]), torch.ones(5, 1)
    out = moe_layer(x, ids, gate, layer.weights("triton"))
    assert relative_error(out, layer.oracle(x, ids, gate)) <= 1e-6


def test_rows_that_lie_askew_are_taken(layer_of: Maker, rows_of: Maker) -> None:
    """Odd strides and addresses: copied first, for blocks that load sixteen bytes at a time."""
    layer, x = layer_of(2, 16, 16), rows_of(5, 16, torch.float32)
    ids, gate = torch.tensor([[0], [1], [1], [0], [1]]), torch.ones(5, 1)
    weights = layer.weights("triton")
    askew = torch.zeros(6, 17)[1:, 1:].copy_(x)
    assert torch.equal(moe_layer(askew, ids, gate, weights), moe_layer(x, ids, gate, weights))


def test_chosen_ids_go_through_the_fused_router(
    layer_of: Maker, ids_of: Maker, rows_of: Maker, gates_of: Maker
) -> None:
    """Table, quotas and record with ids, as with logits: the host's slots and counts."""
    slot_expert = [3, 0, 4, 1, 2, 0, 3, 3]
    layer, x = layer_of(5, 24, 16), rows_of(33, 24, torch.float32)
    ids, gate = ids_of(33, 2, 5), gates_of(33, 2)
    ids[::7, 1] = 5
    ids[::5, 0] = -1
    count = histogram(ids, 5)
    quota = count[torch.tensor(slot_expert)].clone()
    quota[1], quota[5] = count[0] // 2, count[0] - count[0] // 2
    quota[0], quota[6], quota[7] = count[3] // 3, 0, count[3] - count[3] // 3
    table, record = DispatchTable(slot_expert, torch.device("cpu")), LoadRecord(5, 8, "cpu")
    weights = layer.weights("triton", slot_expert)
    out = moe_layer(x, ids, gate, weights, table=table, quota_S=quota, record=record)
    assert torch.equal(out, moe_layer(x, ids, gate, layer.weights("triton")))
    host = route(ids, torch.tensor(slot_expert), quota_S=quota, num_experts=5)
    assert torch.equal(record.logical_E, host.logical_E)
    assert torch.equal(record.physical_S, host.physical_S)


def test_a_record_too_small_is_refused_before_a_kernel_writes(
    layer_of: Maker, rows_of: Maker
) -> None:
    weights, x = layer_of(3, 16, 16).weights("triton"), rows_of(5, 16, torch.float32)
    with pytest.raises(InputError, match="the load record holds 1 experts and 1 slots"):
        moe_layer_from_logits(
            x, torch.zeros(5, 3), weights, k=1, normalize=True, record=LoadRecord(1, 1, "cpu")
        )
    with pytest.raises(InputError, match=r"quotas are torch\.float32"):
        moe_layer_from_logits(
            x, torch.zeros(5, 3), weights, k=1, normalize=True, quota_S=torch.ones(3)
        )
