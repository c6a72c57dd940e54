"""The Triton kernels, run by Triton's interpreter on small shapes against float64.

The interpreter stores bfloat16 by cutting bits off and runs programs one after another: values
are checked within tolerances and races are not seen here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.oracles.expert_layer import relative_error
from benchmarks.rank_layer import rank_layer
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.gpu.backend import INTERPRETED, reduce_rows
from loadmaster.kernels.grouped import grouped_experts
from loadmaster.kernels.routing import combine_rows, sort_by_slot

Maker = Callable[..., Any]

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton was imported for a GPU")


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
    out = rank_layer(x, ids, gate, layer.weights("triton"))
    assert relative_error(out, layer.oracle(x, ids, gate)) <= 1e-6


def test_bfloat16_within_the_interpreters_means(
    layer_of: Maker, ids_of: Maker, rows_of: Maker, gates_of: Maker
) -> None:
    layer = layer_of(4, 32, 16, torch.bfloat16)
    x, ids, gate = rows_of(20, 32, torch.bfloat16), ids_of(20, 2, 4), gates_of(20, 2)
    out = rank_layer(x, ids, gate, layer.weights("triton"))
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
)
def test_rows_of_each_slot_pass_through_its_expert(
    counts: list[int], layer_of: Maker, rows_of: Maker
) -> None:
    layer = layer_of(3, 32, 16)
    x = rows_of(sum(counts), 32, torch.float32)
    out = torch.full_like(x, float("nan"))
    grouped_experts(x, torch.tensor(counts), layer.weights("triton"), out=out)
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    assert relative_error(out, layer.oracle_rows(x, slots)) <= 1e-6


@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (1, 17), (16, 1)])
def test_sizes_of_one(hidden: int, intermediate: int, layer_of: Maker, rows_of: Maker) -> None:
    layer, x = layer_of(2, hidden, intermediate), rows_of(5, hidden, torch.float32)
    y = grouped_experts(x, torch.tensor([2, 3]), layer.weights("triton"))
    assert relative_error(y, layer.oracle_rows(x, [0, 0, 1, 1, 1])) <= 1e-6


def test_rows_that_lie_askew_are_taken(layer_of: Maker, rows_of: Maker) -> None:
    """Odd strides and addresses: copied first, for blocks that load sixteen bytes at a time."""
    layer, x = layer_of(2, 16, 16), rows_of(5, 16, torch.float32)
    weights, counts = layer.weights("triton"), torch.tensor([2, 3])
    askew = torch.zeros(6, 17)[1:, 1:].copy_(x)
    y = grouped_experts(x, counts, weights)
    assert torch.equal(grouped_experts(askew, counts, weights), y)
    wide = torch.zeros(5, 32)
    grouped_experts(x, counts, weights, out=wide[:, ::2])
    assert torch.equal(wide[:, ::2], y)


def test_a_slot_filled_again_reaches_no_other(layer_of: Maker, rows_of: Maker) -> None:
    layer = layer_of(3, 16, 16)
    weights, x = layer.weights("triton"), rows_of(9, 16, torch.float32)
    weights.load_slot(2, layer.experts[1])
    assert torch.equal(weights.get_slot(2)["gate_up"], layer.experts[1]["gate_up"])
    y = grouped_experts(x, torch.tensor([3, 3, 3]), weights)
    assert relative_error(y, layer.oracle_rows(x, [0] * 3 + [1] * 6)) <= 1e-6


def test_rows_are_combined_as_on_the_cpu(rows_of: Maker) -> None:
    """Left-out rows among them; the two sum alike, to the last bits."""
    y = rows_of(60, 24, torch.float32)
    slot = torch.randint(-1, 4, (30, 2), generator=torch.Generator().manual_seed(0))
    gate = torch.rand(30, 2, generator=torch.Generator().manual_seed(1))
    _, _, row = sort_by_slot(slot, 4)
    out = torch.full((30, 24), float("nan"))
    reduce_rows(y, row, gate, out)
    torch.testing.assert_close(out, combine_rows(y, row, gate))


def test_no_row_past_y_is_read(rows_of: Maker) -> None:
    memory = rows_of(8, 16, torch.float32)
    where = torch.tensor([[0, 3], [4, 1], [2**31 - 1, 2]])
    out = torch.full((3, 16), float("nan"))
    reduce_rows(memory[:4], where, torch.ones(3, 2), out)
    want = torch.stack((memory[0] + memory[3], memory[1], memory[2]))
    torch.testing.assert_close(out, want)
