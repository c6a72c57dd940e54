"""Panels: how they hold matrices, what a product rounds, and when they are chosen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.oracles.expert_layer import relative_error
from loadmaster.errors import InputError
from loadmaster.foundation.compiled import compiled_fused
from loadmaster.kernels import weights
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.cpu import panel_matrix, panels
from loadmaster.kernels.cpu.packed import packed_available
from loadmaster.kernels.cpu.panel_loops import CHUNK_ROWS
from loadmaster.kernels.cpu.panel_matrix import panels_available
from loadmaster.kernels.cpu.panels import LARGEST_SMALL, panels_preferred
from loadmaster.kernels.cpu.scalars import as_array
from loadmaster.kernels.cpu.tiles import (
    BLOCK_WORDS,
    HAS_PAIR_PRODUCTS,
    PANEL,
    from_panels,
    padded_columns,
    panel_product,
    to_panels,
)
from loadmaster.kernels.grouped import ExpertWeights, grouped_experts

Maker = Callable[..., Any]

SILU = ExpertActivation("silu")

needs_products = pytest.mark.skipif(
    not panels_available(torch.float32), reason="this processor fuses no products and sums"
)
needs_pairs = pytest.mark.skipif(
    not HAS_PAIR_PRODUCTS, reason="this processor multiplies no bfloat16 pairs"
)
pytestmark = needs_products
DTYPES = [torch.float32, torch.bfloat16]
# What rows are, and what the matrix is: bfloat16 is widened where rows are float32.
FACTORS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    pytest.param(torch.bfloat16, torch.bfloat16, marks=needs_pairs),
]


@compiled_fused
def _product(x: Any, panels: Any, bias: Any, out: Any) -> None:
    for p in range(len(panels)):
        panel_product(x, panels[p], bias[p * PANEL :], out, p * PANEL)


def _panels_of(matrix: torch.Tensor) -> np.ndarray[Any, Any]:
    """A matrix whose rows are whole words, as the backend packs it."""
    words = matrix.contiguous().view(torch.int32).numpy()
    words = words.view(np.float32 if matrix.dtype == torch.float32 else np.uint32)
    panels = np.empty((padded_columns(len(words)) // PANEL, words.shape[1], PANEL), words.dtype)
    to_panels(words, panels)
    return panels


@settings(deadline=None)
@given(st.integers(1, 3 * PANEL), st.integers(1, 40))
def test_panels_give_back_the_matrix(columns: int, depth: int) -> None:
    matrix = torch.randn(columns, depth, generator=torch.Generator().manual_seed(columns))
    panels = _panels_of(matrix)
    assert np.array_equal(from_panels(panels, columns), matrix.numpy())
    padding = from_panels(panels, padded_columns(columns))[columns:]
    assert (padding == 0).all()


@pytest.mark.parametrize(("row_dtype", "dtype"), FACTORS)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 20), columns=st.integers(1, 2 * PANEL),
    depth=st.sampled_from([2, 4, 34, 2 * BLOCK_WORDS, 4 * BLOCK_WORDS + 6]),
)
def test_products_of_whole_numbers_are_exact(
    row_dtype: torch.dtype, dtype: torch.dtype, rows: int, columns: int, depth: int
) -> None:
    """Every tile height, one to several blocks: small integers leave nothing to round."""
    g = torch.Generator().manual_seed(rows + columns)
    x = torch.randint(-8, 9, (rows, depth), generator=g).to(row_dtype)
    matrix = torch.randint(-8, 9, (columns, depth), generator=g).to(dtype)
    bias = np.arange(padded_columns(columns), dtype=np.float32)
    out = np.full((rows, padded_columns(columns)), np.nan, np.float32)
    _product(as_array(x), _panels_of(matrix), bias, out)
    expected = x.double().numpy() @ matrix.double().numpy().T + bias[:columns]
    assert np.array_equal(out[:, :columns], expected)


def test_a_float32_product_is_blocks_of_fused_steps() -> None:
    """Bit for bit: float64 holds the product of two float32 numbers, so that adding to it and
    rounding once is the fused step (but for double rounding, too rare for these few numbers)."""
    depth = BLOCK_WORDS + 37
    g = torch.Generator().manual_seed(5)
    x, matrix = torch.randn(7, depth, generator=g), torch.randn(PANEL, depth, generator=g)
    out = np.empty((7, PANEL), np.float32)
    _product(x.numpy(), _panels_of(matrix), np.ones(PANEL, np.float32), out)
    expected = np.ones((7, PANEL), np.float32)
    for first in range(0, depth, BLOCK_WORDS):
        total = np.zeros((7, PANEL), np.float32)
        for k in range(first, min(first + BLOCK_WORDS, depth)):
            product = np.outer(x[:, k].double().numpy(), matrix[:, k].double().numpy())
            total = (total + product).astype(np.float32)
        expected += total
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_a_chunk_give_the_bits_of_few(
    dtype: torch.dtype, layer_of: Maker, rows_of: Maker
) -> None:
    held = layer_of(3, 40, 24, dtype).weights("panels")
    counts = [CHUNK_ROWS - 3, 7, CHUNK_ROWS + 11]
    x = rows_of(sum(counts), 40, dtype)
    whole = grouped_experts(x, torch.tensor(counts), held)
    start = 0
    for slot, count in enumerate(counts):
        for row in (start, start + count // 2, start + count - 1):
            alone = torch.zeros(3, dtype=torch.int64)
            alone[slot] = 1
            y = grouped_experts(x[row : row + 1], alone, held)
            assert torch.equal(y[0], whole[row])
        start += count


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_wide_experts_stay_as_exact_as_narrow_ones(
    dtype: torch.dtype, tolerance: float, layer_of: Maker, rows_of: Maker
) -> None:
    """Four thousand terms in one sum; blocks keep float32 from losing digits."""
    layer, x = layer_of(1, 4096, 256, dtype), rows_of(5, 4096, dtype)
    y = grouped_experts(x, torch.tensor([5]), layer.weights("panels"))
    assert relative_error(y, layer.oracle_rows(x, [0] * 5)) <= tolerance


def test_auto_chooses_by_size_and_type_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "HAS_MATRIX_UNITS", True)
    small, large = (LARGEST_SMALL // 64, 64), (LARGEST_SMALL // 64 + 1, 64)
    assert panels_preferred(*large, torch.float32)
    assert panels_preferred(*small, torch.bfloat16)
    assert not panels_preferred(*large, torch.bfloat16)
    assert not panels_preferred(*small, torch.float64)
    monkeypatch.setattr(panels, "HAS_MATRIX_UNITS", False)
    assert panels_preferred(*large, torch.bfloat16)


def test_a_machine_without_the_products_takes_another_backend(
    layer_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panel_matrix, "HAS_FUSED_PRODUCTS", False)
    for dtype in DTYPES:
        other = "packed" if packed_available(dtype) else "torch"
        assert layer_of(2, 64, 32, dtype).weights().backend == other
        with pytest.raises(InputError, match="'panels' cannot run"):
            ExpertWeights.allocate(
                2, 64, 32, dtype=dtype, device="cpu", activation=SILU, backend="panels"
            )


def test_large_bfloat16_experts_are_panels_where_onednn_packs_none(
    layer_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "packed_available", lambda dtype: False)
    monkeypatch.setattr(panels, "HAS_MATRIX_UNITS", True)
    assert layer_of(1, LARGEST_SMALL // 64 + 1, 64, torch.bfloat16).weights().backend == "panels"


def test_a_machine_without_pair_products_widens_bfloat16(
    layer_of: Maker, rows_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, biases, one row to several chunks; the same bits however many rows there are."""
    monkeypatch.setattr(panel_matrix, "HAS_PAIR_PRODUCTS", False)
    layer = layer_of(3, 41, 23, torch.bfloat16, bias=True)
    held, counts = layer.weights("panels"), [CHUNK_ROWS + 5, 0, 9]
    x = rows_of(sum(counts), 41, torch.bfloat16)
    y = grouped_experts(x, torch.tensor(counts), held)
    expert_A = [0] * counts[0] + [2] * counts[2]
    assert relative_error(y, layer.oracle_rows(x, expert_A)) <= 1e-2
    for row in (0, CHUNK_ROWS, sum(counts) - 1):
        alone = torch.zeros(3, dtype=torch.int64)
        alone[expert_A[row]] = 1
        assert torch.equal(grouped_experts(x[row : row + 1], alone, held)[0], y[row])


def test_not_a_number_in_a_weight_comes_back_bit_for_bit(layer_of: Maker) -> None:
    layer = layer_of(1, 8, 5, torch.bfloat16, bias=True)
    bits = torch.tensor([0x7FC1, 0x7F81, -1, 0x7F80], dtype=torch.int16)
    for name in ("down", "down_bias", "gate_up_bias"):
        layer.experts[0][name].view(torch.int16).view(-1)[:4] = bits
    returned = layer.weights("panels").get_slot(0)
    for name in ("down", "down_bias", "gate_up_bias"):
        assert torch.equal(returned[name].view(torch.int16).view(-1)[:4], bits), name
