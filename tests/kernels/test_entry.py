"""What the entry refuses, leaves out and takes beside ids: records, tables, odd types, devices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loadmaster.errors import InputError
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.cpu import loops
from loadmaster.kernels.grouped import (
    DispatchTable,
    ExpertWeights,
    LoadRecord,
    moe_layer,
    moe_layer_from_logits,
)
from loadmaster.kernels.routing import combine_rows, histogram, route
from loadmaster.kernels.weights import with_index

Maker = Callable[..., Any]


def _weights() -> ExpertWeights:
    return ExpertWeights.allocate(
        3, 8, 4, dtype=torch.float32, device="cpu", activation=ExpertActivation("silu")
    )


@pytest.mark.parametrize(("experts", "slots"), [(1, 3), (3, 1), (9, 3), (3, 9)])
def test_refuses_a_record_of_another_layer(experts: int, slots: int) -> None:
    """A kernel would add past its end."""
    x, record = torch.zeros(5, 8), LoadRecord(experts, slots, "cpu")
    message = f"holds {experts} experts and {slots} slots on cpu; the layer has 3 experts and 3"
    with pytest.raises(InputError, match=message):
        moe_layer_from_logits(
            x, torch.zeros(5, 3), _weights(), k=1, normalize=True, record=record
        )
    with pytest.raises(InputError, match="the load record holds"):
        moe_layer(x, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), _weights(),
                  record=record)
    with pytest.raises(InputError, match="the load record holds"):
        route(torch.zeros(5, 1, dtype=torch.int64), torch.arange(3), record=record)


def test_a_record_on_another_device_is_refused() -> None:
    record = LoadRecord(3, 3, "meta")
    with pytest.raises(InputError, match="on meta; the layer has 3 experts and 3 slots on cpu"):
        moe_layer_from_logits(
            torch.zeros(5, 8), torch.zeros(5, 3), _weights(), k=1, normalize=True, record=record
        )


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors name their GPU with its number; "cuda" alone would equal none of them."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda:3")
    assert with_index(torch.device("cuda:1")) == torch.device("cuda:1")
    assert with_index(torch.device("cpu:0")) == torch.zeros(0).device


def test_unsigned_ids_keep_their_mark_for_elsewhere(layer_of: Maker, rows_of: Maker) -> None:
    layer, x = layer_of(3, 8, 4), rows_of(5, 8, torch.float32)
    ids = torch.tensor([[0, 3], [3, 3], [1, 2], [2, 3], [3, 0]])
    gate = torch.full((5, 2), 0.5)
    want = moe_layer(x, ids, gate, layer.weights())
    assert torch.equal(moe_layer(x, ids.to(torch.uint8), gate, layer.weights()), want)
    assert (want[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_rank_with_nothing_to_do_gives_zeros(dtype: torch.dtype, layer_of: Maker) -> None:
    layer, x = layer_of(3, 8, 4, dtype), torch.ones(5, 8, dtype=dtype)
    out = moe_layer(x, torch.full((5, 2), -1), torch.ones(5, 2), layer.weights("torch"))
    assert torch.equal(out, torch.zeros(5, 8, dtype=dtype))


def test_combine_refuses_rows_past_y_and_rows_that_are_not_whole() -> None:
    for dtype in (torch.float32, torch.float64):
        y, gate = torch.ones(2, 8, dtype=dtype), torch.ones(2, 1)
        with pytest.raises(InputError, match="row 7 is past the 2 rows of y"):
            combine_rows(y, torch.full((2, 1), 7), gate)
        with pytest.raises(InputError, match="rows are"):
            combine_rows(y, torch.full((2, 1), 0.7), gate)


def test_moe_layer_takes_a_table_quotas_and_a_record(
    layer_of: Maker, ids_of: Maker, rows_of: Maker, gates_of: Maker
) -> None:
    slot_expert = [1, 0, 1]
    layer, x = layer_of(2, 16, 16), rows_of(25, 16, torch.float32)
    ids, gate = ids_of(25, 1, 2), gates_of(25, 1)
    count, record = histogram(ids, 2), LoadRecord(2, 3, "cpu")
    quota = torch.tensor([2, int(count[0]), int(count[1]) - 2])
    table = DispatchTable(slot_expert, torch.device("cpu"))
    for backend in ("auto", "torch"):
        out = moe_layer(
            x, ids, gate, layer.weights(backend, slot_expert),
            table=table, quota_S=quota, record=record,
        )
        assert torch.equal(out, moe_layer(x, ids, gate, layer.weights(backend)))
        logical, physical = record.take()
        assert torch.equal(logical, count) and torch.equal(physical, quota)


def test_a_layer_from_logits_sorts_once(
    layer_of: Maker, rows_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`route` sorts; the backend takes its order over."""
    layer, x = layer_of(3, 16, 16), rows_of(9, 16, torch.float32)
    weights, logits = layer.weights(), torch.randn(9, 3)
    want = moe_layer_from_logits(x, logits, weights, k=2, normalize=True)
    monkeypatch.setattr(loops, "sort_slots", None)
    out = moe_layer_from_logits(
        x, logits, weights, k=2, normalize=True, record=LoadRecord(3, 3, "cpu")
    )
    assert torch.equal(out, want)
