"""The Triton kernels, run by Triton's interpreter on small shapes against float64.

The interpreter stores bfloat16 by cutting bits off and runs programs one after another: values
are checked within tolerances and races are not seen here. The integers are exact.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks.oracles.expert_layer import relative_error
from loadmaster.errors import InputError
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.gpu.backend import INTERPRETED, TritonSlots, reduce_rows
from loadmaster.kernels.grouped import (
    ExpertWeights,
    grouped_experts,
    moe_layer,
    moe_layer_from_logits,
)
from loadmaster.kernels.load_record import LoadRecord
from loadmaster.kernels.routing import combine_rows, histogram, route, top_k
from loadmaster.kernels.segment_table import DispatchTable

Maker = Callable[..., Any]

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton was imported for a GPU")


def _routed(weights: ExpertWeights, slot_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """source, where, row_end, tiles and tile_count of the backend's own routing pass."""
    backend = weights._backend
    assert isinstance(backend, TritonSlots)
    gate = torch.zeros(slot_TK.shape)
    routed = backend._router.route(None, slot_TK, gate, False, backend._identity, None, None)
    tiles = routed.tiles
    return (
        routed.source_A,
        routed.where_TK,
        tiles.row_end,
        torch.stack((tiles.tile_segment, tiles.tile_row)),
        tiles.tile_count,
    )


@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "hidden", "intermediate"),
    [
        (1, 3, 3, 17, 33),
        (15, 12, 2, 33, 17),
        (17, 16, 1, 64, 16),
        (37, 7, 3, 47, 33),
        (64, 5, 5, 16, 64),
    ],
)
def test_layer_matches_float64(
    tokens: int,
    experts: int,
    choices: int,
    hidden: int,
    intermediate: int,
    layer_of: Maker,
    ids_of: Maker,
    rows_of: Maker,
    gates_of: Maker,
) -> None:
    layer = layer_of(experts, hidden, intermediate)
    x, ids = rows_of(tokens, hidden, torch.float32), ids_of(tokens, choices, experts)
    gate = gates_of(tokens, choices)
    out = torch.full_like(x, float("nan"))
    moe_layer(x, ids, gate, layer.weights("triton"), out=out)
    assert relative_error(out, layer.oracle(x, ids, gate)) <= 1e-6


def test_bfloat16_within_the_interpreters_means(
    layer_of: Maker, ids_of: Maker, rows_of: Maker, gates_of: Maker
) -> None:
    layer = layer_of(4, 32, 16, torch.bfloat16)
    x, ids, gate = rows_of(20, 32, torch.bfloat16), ids_of(20, 2, 4), gates_of(20, 2)
    out = moe_layer(x, ids, gate, layer.weights("triton"))
    assert relative_error(out, layer.oracle(x, ids, gate)) <= 2e-2


@pytest.mark.parametrize(
    "activation",
    [
        ExpertActivation("gelu"),
        ExpertActivation("gelu_tanh"),
        ExpertActivation("relu"),
        ExpertActivation("gptoss_clamped", limit=0.8, alpha=1.702, interleaved=True),
    ],
    ids=lambda activation: activation.kind,
)
def test_every_activation_with_biases(
    activation: ExpertActivation, layer_of: Maker, rows_of: Maker
) -> None:
    layer = layer_of(3, 24, 20, torch.float32, activation, True)
    x, counts = rows_of(18, 24, torch.float32), torch.tensor([9, 0, 9])
    y = grouped_experts(x, counts, layer.weights("triton"))
    assert relative_error(y, layer.oracle_rows(x, [0] * 9 + [2] * 9)) <= 1e-6


@pytest.mark.parametrize(
    "counts",
    [[0, 0, 0], [0, 40, 0], [0, 0, 33], [15, 16, 17], [31, 1, 32]],
    ids=lambda counts: "-".join(map(str, counts)),
)
def test_any_histogram_covers_every_row_once(
    counts: list[int], layer_of: Maker, rows_of: Maker
) -> None:
    """Empty, hot, first and last slots, and counts one beside a block's rows."""
    layer = layer_of(3, 16, 16)
    x = rows_of(sum(counts), 16, torch.float32)
    out = torch.full_like(x, float("nan"))
    grouped_experts(x, torch.tensor(counts), layer.weights("triton"), out=out)
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    assert relative_error(out, layer.oracle_rows(x, slots)) <= 1e-6


@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_routing_is_the_stable_sort_exactly(
    tokens: int, layer_of: Maker, ids_of: Maker
) -> None:
    """Order, offsets and tiles, over one block of tokens and over many, sentinels among them."""
    experts, choices = 80, 4
    ids = ids_of(tokens, choices, experts)
    ids[::3, 1] = -99999
    ids[1::5, 2] = -1
    expected = route(ids, torch.arange(experts), num_experts=experts)
    weights = layer_of(experts, 16, 16).weights("triton")
    source, where, row_end, tiles, tile_count = _routed(weights, ids)
    kept = len(expected.order_A)
    assert torch.equal(source[:kept].long(), expected.order_A)
    flat = torch.arange(ids.numel()).view(ids.shape)
    assert torch.equal(where.long(), torch.where(ids >= 0, flat, -1))
    assert torch.equal(row_end[:experts].long(), expected.offset_S[1:])
    covered = torch.zeros(kept, dtype=torch.int64)
    for segment, row in tiles[:, : int(tile_count)].T.tolist():
        end = min(row + 16, int(row_end[segment]))
        assert expected.offset_S[segment] <= row < end
        covered[row:end] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_logits_give_the_gates_and_counts_of_the_host(
    normalize: bool, layer_of: Maker, rows_of: Maker
) -> None:
    layer = layer_of(9, 16, 16)
    weights, x = layer.weights("triton"), rows_of(40, 16, torch.float32)
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    gate, ids = top_k(logits, 3, normalize=normalize)
    record = LoadRecord(9, 9, "cpu")
    out = moe_layer_from_logits(x, logits, weights, k=3, normalize=normalize, record=record)
    assert relative_error(out, layer.oracle(x, ids, gate)) <= 1e-6
    count = histogram(ids, 9)
    assert torch.equal(record.logical_E, count) and torch.equal(record.physical_S, count)
    record.switch(False)
    moe_layer_from_logits(x, logits, weights, k=3, normalize=normalize, record=record)
    assert torch.equal(record.logical_E, count)
    record.switch(True)
    moe_layer_from_logits(x[:5], logits[:5], weights, k=3, normalize=normalize, record=record)
    both = count + histogram(ids[:5], 9)
    assert [t.tolist() for t in record.take()] == [both.tolist()] * 2
    assert int(record.logical_E.sum() + record.physical_S.sum()) == 0


def test_replicas_by_quota_change_no_bit(layer_of: Maker, rows_of: Maker) -> None:
    """The same layer with every expert once, and with replicas cut at random quotas."""
    experts, slot_expert = 5, [3, 0, 4, 1, 2, 0, 3, 3]
    layer, x = layer_of(experts, 24, 16), rows_of(33, 24, torch.float32)
    logits = torch.randn(33, experts, generator=torch.Generator().manual_seed(1))
    _, ids = top_k(logits, 2, normalize=True)
    single = moe_layer_from_logits(x, logits, layer.weights("triton"), k=2, normalize=True)
    weights = layer.weights("triton", slot_expert)
    table, count = DispatchTable(slot_expert, torch.device("cpu")), histogram(ids, experts)
    for first, second in ((0, 0), (4, 3), (int(count[0]), int(count[3]))):
        quota = count[torch.tensor(slot_expert)].clone()
        quota[1], quota[5] = first, count[0] - first
        quota[0], quota[6], quota[7] = second, 0, count[3] - second
        record = LoadRecord(experts, len(slot_expert), "cpu")
        out = moe_layer_from_logits(
            x, logits, weights, k=2, normalize=True, table=table, quota_S=quota, record=record
        )
        assert torch.equal(out, single)
        assert torch.equal(record.physical_S, quota)
        assert torch.equal(record.logical_E, count)


def test_quotas_that_do_not_add_up_lose_no_token(layer_of: Maker, rows_of: Maker) -> None:
    slot_expert = [0, 1, 0, 1]
    layer, x = layer_of(2, 16, 16), rows_of(20, 16, torch.float32)
    logits = torch.randn(20, 2, generator=torch.Generator().manual_seed(2))
    single = moe_layer_from_logits(x, logits, layer.weights("triton"), k=1, normalize=True)
    weights = layer.weights("triton", slot_expert)
    table = DispatchTable(slot_expert, torch.device("cpu"))
    for quota in ([0, 0, 0, 0], [99, 99, 99, 99], [-5, 3, 2, 1]):
        out = moe_layer_from_logits(
            x, logits, weights, k=1, normalize=True, table=table, quota_S=torch.tensor(quota)
        )
        assert torch.equal(out, single)


def test_nan_logits_stay_in_their_token(layer_of: Maker, rows_of: Maker) -> None:
    layer, x = layer_of(4, 16, 16), rows_of(6, 16, torch.float32)
    weights = layer.weights("triton")
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    clean = moe_layer_from_logits(x, logits, weights, k=2, normalize=True)
    logits[2, 3] = float("nan")
    out = moe_layer_from_logits(x, logits, weights, k=2, normalize=True)
    others = torch.arange(6) != 2
    assert out[2].isnan().all() and torch.equal(out[others], clean[others])


@pytest.fixture
def order_free_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies tiles with numpy, whose float32 sums follow the tile's shape on
    some processors. In float64 their order hardly matters; they are rounded at the end."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder

    def create_dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64) + total.data
        handle = interpreter.TensorHandle
        return handle(product.astype(total.data.dtype), total.dtype.scalar)

    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.mark.usefixtures("order_free_products")
def test_layer_equals_its_parts_bit_for_bit(
    layer_of: Maker, ids_of: Maker, rows_of: Maker, gates_of: Maker
) -> None:
    """What one rank fuses and what several ranks exchange rounds alike."""
    layer = layer_of(4, 24, 16)
    weights = layer.weights("triton")
    x, ids, gate = rows_of(30, 24, torch.float32), ids_of(30, 2, 4), gates_of(30, 2)
    whole = moe_layer(x, ids, gate, weights)
    routing = route(ids, torch.arange(4))
    y = grouped_experts(x[routing.order_A // 2], routing.physical_S, weights)
    parts = torch.empty_like(x)
    reduce_rows(y, routing.row_TK, gate, parts)
    assert torch.equal(parts, whole)
    torch.testing.assert_close(combine_rows(y, routing.row_TK, gate), whole)


def test_rearranging_swaps_a_table_and_copies_nothing(
    layer_of: Maker, rows_of: Maker
) -> None:
    layer = layer_of(3, 16, 16)
    weights, x = layer.weights("triton"), rows_of(9, 16, torch.float32)
    backend = weights._backend
    assert isinstance(backend, TritonSlots)
    stacked = backend._stacked["down"].clone()
    weights.rearrange([2, 0, 2])
    assert torch.equal(backend._stacked["down"], stacked)
    y = grouped_experts(x, torch.tensor([3, 3, 3]), weights)
    assert relative_error(y, layer.oracle_rows(x, [2] * 3 + [0] * 3 + [2] * 3)) <= 1e-6
    weights.load_slot(2, layer.experts[1])
    assert torch.equal(weights.get_slot(2)["gate_up"], layer.experts[1]["gate_up"])
    assert torch.equal(weights.get_slot(0)["gate_up"], layer.experts[2]["gate_up"])


def test_counts_that_lie_never_reach_past_the_rows(layer_of: Maker, rows_of: Maker) -> None:
    """On a device counts are not read back, so the kernels themselves must stay inside."""
    layer, x = layer_of(3, 16, 16), rows_of(6, 16, torch.float32)
    backend = layer.weights("triton")._backend
    assert isinstance(backend, TritonSlots)
    guarded = torch.full((12, 16), 7.0)
    backend.run(x, torch.tensor([4, -3, 50]), guarded[:6])
    assert (guarded[6:] == 7.0).all()
    assert relative_error(guarded[:6], layer.oracle_rows(x, [0] * 4 + [2] * 2)) <= 1e-6


def test_the_entry_refuses_tables_and_logits_that_do_not_fit(
    layer_of: Maker, rows_of: Maker
) -> None:
    weights, x = layer_of(2, 16, 16).weights("auto", [0, 1, 0]), rows_of(4, 16, torch.float32)
    table = DispatchTable([0, 1, 0], torch.device("cpu"))
    logits = torch.zeros(4, 2)
    common: dict[str, Any] = {"k": 1, "normalize": True}
    with pytest.raises(InputError, match="give quota_S"):
        moe_layer_from_logits(x, logits, weights, table=table, **common)
    with pytest.raises(InputError, match=r"must be \[3\]"):
        short = torch.tensor([1, 1])
        moe_layer_from_logits(x, logits, weights, table=table, quota_S=short, **common)
    with pytest.raises(InputError, match="holds 3 experts in 3 slots"):
        moe_layer_from_logits(x, logits, weights, **common)
    with pytest.raises(InputError, match=r"logits must be \[T, E\]"):
        moe_layer_from_logits(x, logits[:3], weights, table=table, **common)
    with pytest.raises(InputError, match="expert 1 stands in no slot"):
        DispatchTable([0, 2], torch.device("cpu"))
    with pytest.raises(InputError, match="holds no expert"):
        DispatchTable([-1, -1], torch.device("cpu"))


def test_the_cpu_backends_route_from_logits_too(layer_of: Maker, rows_of: Maker) -> None:
    slot_expert = [1, 0, 1]
    layer, x = layer_of(2, 16, 16, torch.bfloat16), rows_of(25, 16, torch.bfloat16)
    logits = torch.randn(25, 2, generator=torch.Generator().manual_seed(0))
    gate, ids = top_k(logits, 1, normalize=False)
    single = moe_layer(x, ids, gate, layer.weights())
    count, record = histogram(ids, 2), LoadRecord(2, 3, "cpu")
    quota = torch.tensor([2, count[0], count[1] - 2])
    out = moe_layer_from_logits(
        x,
        logits,
        layer.weights("auto", slot_expert),
        k=1,
        normalize=False,
        table=DispatchTable(slot_expert, torch.device("cpu")),
        quota_S=quota,
        record=record,
    )
    assert torch.equal(out, single)
    assert torch.equal(record.physical_S, quota) and torch.equal(record.logical_E, count)
