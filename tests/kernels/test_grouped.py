"""The one entry: right against float64, strict about its input, the same for every backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.oracles.expert_layer import relative_error
from benchmarks.rank_layer import rank_layer
from loadmaster.errors import InputError
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.grouped import ExpertWeights, grouped_experts

Maker = Callable[..., Any]

FLOATS = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
BACKENDS = ["torch", "packed", "panels"]
GPT_OSS = ExpertActivation("gptoss_clamped", limit=0.8, alpha=1.702, interleaved=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), FLOATS)
@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "hidden", "intermediate"),
    [
        (0, 3, 1, 8, 4),
        (1, 3, 3, 17, 33),
        (2, 7, 1, 1, 1),
        (15, 12, 12, 33, 17),
        (16, 7, 3, 47, 97),
        (17, 3, 2, 64, 32),
        (37, 257, 4, 33, 17),
        (64, 12, 3, 96, 47),
        (65, 7, 7, 32, 64),
    ],
)
def test_layer_matches_float64(
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
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
    layer = layer_of(experts, hidden, intermediate, dtype)
    x, ids = rows_of(tokens, hidden, dtype), ids_of(tokens, choices, experts)
    gate = gates_of(tokens, choices)
    out = rank_layer(x, ids, gate, layer.weights(backend))
    assert out.dtype == dtype
    assert relative_error(out, layer.oracle(x, ids, gate)) <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), FLOATS)
@pytest.mark.parametrize(
    "activation",
    [
        ExpertActivation("silu"),
        ExpertActivation("gelu"),
        ExpertActivation("gelu_tanh"),
        ExpertActivation("relu"),
        ExpertActivation("silu", interleaved=True),
        GPT_OSS,
    ],
    ids=lambda activation: f"{activation.kind}{'-interleaved' * activation.interleaved}",
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_every_activation_with_and_without_biases(
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    activation: ExpertActivation,
    bias: bool,
    layer_of: Maker,
    ids_of: Maker,
    rows_of: Maker,
    gates_of: Maker,
) -> None:
    layer = layer_of(5, 40, 24, dtype, activation, bias)
    x, ids, gate = rows_of(21, 40, dtype), ids_of(21, 2, 5), gates_of(21, 2)
    out = rank_layer(x, ids, gate, layer.weights(backend))
    assert relative_error(out, layer.oracle(x, ids, gate)) <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "counts",
    [
        [0, 0, 0, 0],
        [70, 0, 0, 0],
        [0, 0, 0, 70],
        [1, 0, 1, 0],
        [15, 16, 17, 18],
        [0, 33, 0, 3],
        [385, 1, 768, 2],
    ],
)
def test_rows_of_each_slot_pass_through_its_expert(
    backend: str, counts: list[int], layer_of: Maker, rows_of: Maker
) -> None:
    layer = layer_of(4, 24, 16)
    x = rows_of(sum(counts), 24, torch.float32)
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    out = torch.full_like(x, float("nan"))
    returned = grouped_experts(x, torch.tensor(counts), layer.weights(backend), out=out)
    assert returned is out
    assert relative_error(out, layer.oracle_rows(x, slots)) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_weights_may_lie_anyhow(
    backend: str, layer_of: Maker, rows_of: Maker
) -> None:
    """Strided, transposed and oddly aligned tensors give the bits of plain ones."""
    layer = layer_of(2, 24, 16)
    x, counts = rows_of(30, 24, torch.float32), torch.tensor([11, 19], dtype=torch.int32)
    weights = layer.weights(backend)
    expected = grouped_experts(x, counts, weights)
    strided = torch.zeros(30, 2, 24)
    strided[:, 1] = x
    shifted = torch.zeros(30 * 24 + 2)[2:].view(30, 24).copy_(x)
    for rows in (strided[:, 1], x.T.contiguous().T, shifted):
        assert torch.equal(grouped_experts(rows, counts, weights), expected)
    for slot, expert in enumerate(layer.experts):
        weights.set_slot(slot, *(t.T.contiguous().T for t in expert.values()))
    assert torch.equal(grouped_experts(x, counts, weights), expected)
    wide = torch.zeros(30, 48)
    grouped_experts(x, counts, weights, out=wide[:, ::2])
    assert torch.equal(wide[:, ::2], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_out_assignments_add_nothing(
    backend: str, layer_of: Maker, rows_of: Maker
) -> None:
    layer = layer_of(3, 16, 8)
    x, gate = rows_of(3, 16, torch.float32), torch.rand(3, 2)
    slot = torch.tensor([[0, -1], [-1, -99999], [2, 1]])
    out = rank_layer(x, slot, gate, layer.weights(backend))
    assert relative_error(out, layer.oracle(x, slot, gate)) <= 1e-6
    assert (out[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_the_experts_add_up_to_the_whole(
    backend: str, layer_of: Maker, ids_of: Maker, rows_of: Maker, gates_of: Maker
) -> None:
    layer = layer_of(6, 16, 8)
    x, ids, gate = rows_of(20, 16, torch.float32), ids_of(20, 3, 6), gates_of(20, 3)
    whole = rank_layer(x, ids, gate, layer.weights(backend))
    parts = torch.zeros_like(whole)
    for shard in ([0, 1], [2, 3, 4], [5]):
        slot = torch.full_like(ids, -1)
        for place, expert in enumerate(shard):
            slot[ids == expert] = place
        weights = layer.weights(backend, shard)
        parts += rank_layer(x, slot, gate, weights)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_a_token_stays_in_that_token(
    backend: str,
    dtype: torch.dtype,
    layer_of: Maker,
    ids_of: Maker,
    rows_of: Maker,
    gates_of: Maker,
) -> None:
    weights = layer_of(3, 24, 16, dtype).weights(backend)
    x, ids, gate = rows_of(40, 24, dtype), ids_of(40, 2, 3), gates_of(40, 2)
    clean = rank_layer(x, ids, gate, weights)
    x[7, 3] = float("nan")
    out = rank_layer(x, ids, gate, weights)
    others = torch.arange(40) != 7
    assert out[7].isnan().all()
    assert torch.equal(out[others], clean[others])
    assert torch.equal(rank_layer(x[others], ids[others], gate[others], weights), clean[others])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_rank_with_nothing_to_do_gives_zeros(dtype: torch.dtype, layer_of: Maker) -> None:
    layer, x = layer_of(3, 8, 4, dtype), torch.ones(5, 8, dtype=dtype)
    out = rank_layer(x, torch.full((5, 2), -1), torch.ones(5, 2), layer.weights("torch"))
    assert torch.equal(out, torch.zeros(5, 8, dtype=dtype))


def _weights(dtype: torch.dtype = torch.float32) -> ExpertWeights:
    return ExpertWeights.allocate(
        3, 8, 4, dtype=dtype, device="cpu", activation=ExpertActivation("silu")
    )


@pytest.mark.parametrize(
    ("rows", "counts", "message"),
    [
        ((5, 7), [5, 0, 0], r"must be \[rows, 8\]"),
        ((5,), [5, 0, 0], r"must be \[rows, 8\]"),
        ((5, 8), [5, 0], r"must be \[3\] int32 or int64"),
        ((5, 8), [5.0, 0.0, 0.0], r"must be \[3\] int32 or int64"),
        ((5, 8), [6, -1, 0], "lowest count -1"),
        ((5, 8), [2, 1, 1], "holds 4 rows"),
        ((5, 8), [2, 2, 2], "holds 6 rows"),
    ],
)
def test_refuses_counts_and_rows_that_do_not_fit(
    rows: tuple[int, ...], counts: list[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        grouped_experts(torch.zeros(rows), torch.tensor(counts), _weights())


def test_refuses_mixed_types_and_wrong_outputs() -> None:
    x, counts = torch.zeros(5, 8), torch.tensor([5, 0, 0])
    with pytest.raises(InputError, match="convert one of them"):
        grouped_experts(x.bfloat16(), counts, _weights())
    with pytest.raises(InputError, match="out is"):
        grouped_experts(x, counts, _weights(), out=torch.zeros(4, 8))
    with pytest.raises(InputError, match="out is"):
        grouped_experts(x, counts, _weights(), out=torch.zeros(5, 8).bfloat16())
    with pytest.raises(InputError, match="out requires grad"):
        grouped_experts(x, counts, _weights(), out=torch.zeros(5, 8, requires_grad=True))
    with pytest.raises(InputError, match="out is expanded"):
        grouped_experts(x, counts, _weights(), out=torch.zeros(1, 8).expand(5, 8))
    with pytest.raises(InputError, match="on meta; it must be"):
        grouped_experts(x, counts.to("meta"), _weights())


def test_refuses_unknown_backends_and_empty_sizes() -> None:
    sizes: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    sizes["activation"] = ExpertActivation("silu")
    with pytest.raises(InputError, match="'cuda' is not known; use one of auto, torch, packed"):
        ExpertWeights.allocate(1, 8, 8, backend="cuda", **sizes)
    for dtype in (torch.int32, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(InputError, match=f"cannot be held as {dtype}"):
            ExpertWeights.allocate(1, 8, 8, **{**sizes, "dtype": dtype})
    with pytest.raises(InputError, match="must be >= 1; got 1, 0, 8"):
        ExpertWeights.allocate(1, 0, 8, **sizes)
    with pytest.raises(InputError, match=r"'packed' cannot run torch\.float64"):
        ExpertWeights.allocate(
            1, 8, 8, backend="packed", **{**sizes, "dtype": torch.float64}
        )
