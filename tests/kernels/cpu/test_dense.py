"""Dense layers, routers and heads: the layer's own numbers, and every row's bits its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.oracles.expert_layer import relative_error
from loadmaster.errors import LoadmasterError
from loadmaster.kernels.backend import BlockSizes
from loadmaster.kernels.cpu import dense
from loadmaster.kernels.cpu.dense import (
    Matrix,
    PackedMatrix,
    PanelMatrix,
    PlainMatrix,
    RowwiseWeight,
    make_rowwise,
)
from loadmaster.kernels.cpu.packed import packed_available
from loadmaster.kernels.cpu.panel_matrix import panels_available

DTYPES = [torch.bfloat16, torch.float32]
KINDS: list[Any] = [PanelMatrix, PackedMatrix, PlainMatrix]


def linear(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def only(kind: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Have this way of multiplying alone to choose from."""
    if kind is PanelMatrix and not panels_available(dtype):
        pytest.skip("this processor fuses no products and sums")
    if kind is PackedMatrix and not packed_available(dtype):
        pytest.skip(f"oneDNN packs no {dtype} on this processor")
    sizes = (6,) if kind is PanelMatrix else (16, 64)
    monkeypatch.setattr(dense, "_candidates", lambda *shape: iter([(kind, sizes)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (33, 70), (128, 256), (1100, 17)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_layer_gives_what_it_gave(
    kind: Any, dtype: torch.dtype, inputs: int, outputs: int, bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(kind, monkeypatch, dtype)
    layer = linear(inputs, outputs, dtype, bias=bias)
    x = torch.randn(2, 9, inputs).to(dtype)
    want = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    make_rowwise(layer)
    y = layer(x)
    assert y.dtype == dtype and y.shape == want.shape
    allowed = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert relative_error(y.flatten(0, 1), want.flatten(0, 1)) <= allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_others(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(kind, monkeypatch, dtype)
    layer = linear(64, 48, dtype, bias=True)
    make_rowwise(layer)
    x = torch.randn(1300, 64).to(dtype)
    whole = layer(x)
    for first, last in ((0, 1), (7, 9), (511, 514), (100, 400), (1299, 1300)):
        assert torch.equal(layer(x[first:last]), whole[first:last])
    assert layer(x[:0]).shape == (0, 48)


def test_padding_is_not_computed_and_comes_out_as_zeros() -> None:
    layer = linear(16, 8, torch.float32)
    expected = layer(x := torch.randn(1, 64, 16))
    make_rowwise(layer, lambda rows: 5 if rows == 64 else rows)
    y = layer(x)
    torch.testing.assert_close(y[:, :5], expected[:, :5])
    assert not y[:, 5:].any()
    assert torch.equal(layer(x[:, :7])[:, :5], y[:, :5])


class Router(nn.Module):
    """As models write theirs: a matrix of its own, and often another type than the model's."""

    def __init__(self, in_float32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 32).bfloat16(), requires_grad=False)
        self.in_float32 = in_float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_float32:
            return F.linear(x.type(torch.float32), self.weight.type(torch.float32))
        return F.linear(x, self.weight).float()


@pytest.mark.parametrize("in_float32", [False, True])
def test_routers_are_reached_whatever_type_they_compute_in(in_float32: bool) -> None:
    router = Router(in_float32)
    x = torch.randn(70, 32).bfloat16()
    want = F.linear(x.double(), router.weight.double())
    make_rowwise(router)
    whole = router(x)
    assert whole.dtype == torch.float32 and relative_error(whole, want) <= 1e-2
    assert all(torch.equal(router(x[i : i + 1])[0], whole[i]) for i in range(70))


class TiedHead(nn.Module):
    """A head that shares its matrix with the table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.embed(ids)))
        return out


@torch.inference_mode()
def test_embeddings_and_norms_stay_and_code_may_ask_for_a_weights_type() -> None:
    model = TiedHead()
    want = model(ids := torch.arange(20))
    assert sum(make_rowwise(model).backends.values()) == 1
    assert isinstance(model.embed.weight, nn.Parameter)
    assert isinstance(model.head.weight, RowwiseWeight)
    assert model.head.weight.dtype == torch.float32 and model.head.weight.shape == (20, 16)
    torch.testing.assert_close(model(ids), want)


def test_a_weight_used_for_more_than_its_product_is_an_error_not_another_number() -> None:
    layer = linear(8, 4, torch.float32)
    make_rowwise(layer)
    with pytest.raises(LoadmasterError, match="used for more than its product"):
        torch.mm(torch.ones(1, 8), layer.weight.T)
    with pytest.raises(LoadmasterError, match=r"8 inputs in torch\.float32 was given"):
        layer(torch.ones(2, 8).bfloat16())


class Cheat(PlainMatrix):
    """A library that multiplies few rows in another order."""

    name = "cheat"

    def __call__(self, x_RK: torch.Tensor, bias: Any, y_RN: torch.Tensor) -> None:
        super().__call__(x_RK, bias, y_RN)
        if len(x_RK) < 3:
            y_RN.view(torch.int32)[:, 0] += 1


def test_a_product_that_cheats_is_refused_per_shape_and_the_next_one_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def candidates(inputs: int, outputs: int, dtype: torch.dtype) -> Any:
        first: Any = Cheat if inputs == 8 else PlainMatrix
        yield from ((first, (16,)), (PlainMatrix, (64,)))

    monkeypatch.setattr(dense, "_candidates", candidates)
    model = nn.Sequential(*(linear(n, 4, torch.float32) for n in (8, 8, 4)))
    choice = make_rowwise(model)
    assert choice.backends == {"torch": 3}
    (refused,) = choice.refused
    assert refused.startswith("dense 8 x 4, cheat in blocks of 16 rows: row ")
    monkeypatch.setattr(dense, "_candidates", lambda *shape: iter([(Cheat, (16,))]))
    with pytest.raises(LoadmasterError, match="no product gives a row the same bits"):
        make_rowwise(linear(8, 4, torch.float32))


def test_large_bfloat16_layers_go_to_matrix_units_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of what is tried; no product is needed for it."""
    monkeypatch.setattr(dense, "packed_available", lambda dtype: True)
    monkeypatch.setattr(dense, "panels_available", lambda dtype: True)
    monkeypatch.setattr(dense, "panels_preferred", lambda *shape: False)

    def kinds() -> list[type[Matrix]]:
        tried: list[tuple[type[Matrix], BlockSizes]] = list(
            dense._candidates(4096, 4096, torch.bfloat16)
        )
        return list(dict.fromkeys(kind for kind, _ in tried))

    assert kinds() == [PackedMatrix, PanelMatrix, PlainMatrix]
    monkeypatch.setattr(dense, "panels_preferred", lambda *shape: True)
    assert kinds() == [PanelMatrix, PackedMatrix, PlainMatrix]
