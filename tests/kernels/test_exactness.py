"""Placement must not change bits.

The same token gives the same bits whichever slot, replica or rank computes it and whatever else
is in the batch, in bfloat16 and float32, on every backend. Where that holds by what a library
does, `test_self_check.py` shows that another library would be refused.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rank_layer import rank_layer
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.grouped import ExpertWeights, grouped_experts
from loadmaster.kernels.routing import combine_rows, sort_by_slot

Maker = Callable[..., Any]

BACKENDS = ["torch", "packed", "panels"]
DTYPES = [torch.bfloat16, torch.float32]


def layer_over_ranks(
    x: torch.Tensor,
    ids: torch.Tensor,
    gate: torch.Tensor,
    weights_of_rank: list[ExpertWeights],
    slot_expert: list[int],
    home: torch.Tensor,
    seed: int,
) -> torch.Tensor:
    """One layer as ranks run it: home ranks choose slots, each rank computes what it was sent.

    Every home rank spreads its tokens over the replicas at random, as any dispatch policy may.
    """
    table, ranks = torch.tensor(slot_expert), len(weights_of_rank)
    local = len(slot_expert) // ranks
    slot = torch.full_like(ids, -1)
    generator = torch.Generator().manual_seed(seed)
    for rank in range(ranks):
        mine = home == rank
        picks = [int(_pick(table, int(e), generator)) for e in ids[mine].flatten()]
        slot[mine] = torch.tensor(picks, dtype=torch.int64).view(-1, ids.shape[1])
    order, count, row = sort_by_slot(slot, len(slot_expert))
    x_sorted = x[order // ids.shape[1]]
    y = torch.empty_like(x_sorted)
    start = 0
    for rank, weights in enumerate(weights_of_rank):
        counts = count[rank * local : (rank + 1) * local]
        stop = start + int(counts.sum())
        y[start:stop] = grouped_experts(x_sorted[start:stop].clone(), counts, weights)
        start = stop
    return combine_rows(y, row, gate)


def _pick(table: torch.Tensor, expert: int, generator: torch.Generator) -> torch.Tensor:
    slots = (table == expert).nonzero().flatten()
    return slots[torch.randint(len(slots), (1,), generator=generator)[0]]


def random_plan(experts: int, ranks: int, spare: int, seed: int) -> list[int]:
    """Slots of all ranks, rank by rank: every expert once, then random replicas, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    slots = -(-(experts + spare) // ranks) * ranks
    extra = torch.randint(experts, (slots - experts,), generator=generator)
    plan = torch.cat((torch.arange(experts), extra))
    return plan[torch.randperm(slots, generator=generator)].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_plan_over_any_ranks_gives_the_bits_of_one_process(
    backend: str, dtype: torch.dtype, layer_of: Maker, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 10**6))
    experts, ranks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    tokens = data.draw(st.sampled_from([1, 2, 7, 33, 90]))
    choices = data.draw(st.integers(1, experts))
    layer = layer_of(experts, 40, 24, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 40, generator=generator).to(dtype)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices]
    gate = torch.rand(tokens, choices, generator=generator)
    single = rank_layer(x, ids, gate, layer.weights(backend))
    plan = random_plan(experts, ranks, data.draw(st.integers(0, 6)), seed)
    local = len(plan) // ranks
    shards = [layer.weights(backend, plan[r * local : (r + 1) * local]) for r in range(ranks)]
    home = torch.randint(ranks, (tokens,), generator=generator)
    assert torch.equal(layer_over_ranks(x, ids, gate, shards, plan, home, seed), single)
    keep = torch.rand(tokens, generator=generator) < 0.5
    alone = rank_layer(x[keep], ids[keep], gate[keep], layer.weights(backend))
    assert torch.equal(alone, single[keep])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "activation",
    [
        ExpertActivation("silu"),
        ExpertActivation("gelu"),
        ExpertActivation("gptoss_clamped", limit=0.5, alpha=1.702),
    ],
    ids=lambda activation: activation.kind,
)
def test_a_batch_cut_at_any_size_gives_the_same_rows(
    backend: str, dtype: torch.dtype, activation: ExpertActivation, layer_of: Maker
) -> None:
    weights = layer_of(1, 200, 72, dtype, activation).weights(backend)
    x = torch.randn(400, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = grouped_experts(x, torch.tensor([400]), weights)
    for size in (*range(1, 20), 31, 33, 63, 64, 65, 100, 200, 383):
        for start in (0, 3, 400 - size):
            part = x[start : start + size].clone()
            y = grouped_experts(part, torch.tensor([size]), weights)
            assert torch.equal(y, whole[start : start + size]), (size, start)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(2048, 768), (2880, 2880), (1024, 2048)])
def test_wide_experts_give_the_same_rows_in_small_batches(
    backend: str, dtype: torch.dtype, hidden: int, intermediate: int, layer_of: Maker
) -> None:
    """Widths at which a single row, or three, would take other code on this build."""
    weights = layer_of(1, hidden, intermediate, dtype).weights(backend)
    x = torch.randn(64, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = grouped_experts(x, torch.tensor([64]), weights)
    for size in (1, 2, 3, 4, 5, 7, 8, 13, 16):
        for start in range(0, 64 - size, max(size, 4)):
            y = grouped_experts(x[start : start + size], torch.tensor([size]), weights)
            assert torch.equal(y, whole[start : start + size]), (size, start)


@pytest.mark.parametrize("backend", BACKENDS)
def test_five_runs_and_two_threads_give_the_same_bits(
    backend: str, layer_of: Maker, ids_of: Maker, rows_of: Maker, gates_of: Maker
) -> None:
    layer = layer_of(6, 64, 48, torch.bfloat16)
    weights = layer.weights(backend)
    x, ids, gate = rows_of(300, 64, torch.bfloat16), ids_of(300, 2, 6), gates_of(300, 2)
    first = rank_layer(x, ids, gate, weights)
    for _ in range(4):
        assert torch.equal(rank_layer(x, ids, gate, weights), first)
    torch.set_num_threads(2)
    try:
        assert torch.equal(rank_layer(x, ids, gate, weights), first)
    finally:
        torch.set_num_threads(1)


def test_a_switch_between_steps_changes_no_bit(
    layer_of: Maker, ids_of: Maker, rows_of: Maker, gates_of: Maker
) -> None:
    """Fill spare slots, then route by the new plan: the output is the old one."""
    layer = layer_of(4, 32, 16, torch.bfloat16)
    weights = layer.weights("auto", [0, 1, 2, 3, -1, -1])
    x, ids, gate = rows_of(50, 32, torch.bfloat16), ids_of(50, 2, 4), gates_of(50, 2)
    before = rank_layer(x, ids, gate, weights)
    weights.load_slot(4, layer.experts[2])
    weights.load_slot(5, layer.experts[0])
    assert torch.equal(rank_layer(x, ids, gate, weights), before)
    slot = ids.clone()
    slot[25:][ids[25:] == 2], slot[25:][ids[25:] == 0] = 4, 5
    assert torch.equal(rank_layer(x, slot, gate, weights), before)
