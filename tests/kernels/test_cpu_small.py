"""The backend of small experts: how panels hold matrices, and which experts it is chosen for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.kernels import cpu_small
from loadmaster.kernels.cpu_panels import (
    CHUNK_ROWS,
    PANEL,
    from_panels,
    padded_columns,
    segment_products,
    to_panels,
)
from loadmaster.kernels.cpu_small import LARGEST_EXPERT, small_preferred
from loadmaster.kernels.grouped import grouped_experts

Maker = Callable[..., Any]


@settings(deadline=None)
@given(st.integers(1, 3 * PANEL), st.integers(1, 40))
def test_panels_give_back_the_matrix(columns: int, depth: int) -> None:
    matrix = np.random.default_rng(columns).standard_normal((columns, depth), np.float32)
    panels = np.full((padded_columns(columns) // PANEL, depth, PANEL), np.nan, np.float32)
    to_panels(matrix, panels)
    assert np.array_equal(from_panels(panels, columns), matrix)
    assert not np.isnan(panels).any()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 33), st.data())
def test_each_output_is_one_chain_of_fused_products(
    counts: list[int], depth: int, data: st.DataObject
) -> None:
    """Bit for bit: float64 holds every product of two float32 numbers, so rounding its sum with
    the running total is the fused step (but for double rounding, which small integers avoid)."""
    generator = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    offset = np.concatenate(([0], np.cumsum(counts)))
    columns = data.draw(st.integers(1, 2 * PANEL))
    x = generator.integers(-8, 9, (offset[-1], depth)).astype(np.float32)
    matrices = generator.integers(-8, 9, (2, columns, depth)).astype(np.float32)
    bias = generator.integers(-8, 9, (2, padded_columns(columns))).astype(np.float32)
    held = generator.integers(0, 2, len(counts))
    panels = np.zeros((2, padded_columns(columns) // PANEL, depth, PANEL), np.float32)
    for matrix, room in zip(matrices, panels, strict=True):
        to_panels(matrix, room)
    out = np.full((offset[-1], padded_columns(columns)), np.nan, np.float32)
    first = data.draw(st.integers(0, int(offset[-1])))
    segment_products(x[first:], offset, first, held, panels, bias, out[first:])
    for slot, h in enumerate(held):
        for row in range(max(offset[slot], first), offset[slot + 1]):
            expected = matrices[h] @ x[row] + bias[h, :columns]
            assert np.array_equal(out[row, :columns], expected)
    assert np.isnan(out[:first]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_chunk_give_the_bits_of_few(
    dtype: torch.dtype, layer_of: Maker, rows_of: Maker
) -> None:
    weights = layer_of(3, 40, 24, dtype).weights("small")
    counts = [CHUNK_ROWS - 3, 7, CHUNK_ROWS + 11]
    x = rows_of(sum(counts), 40, dtype)
    whole = grouped_experts(x, torch.tensor(counts), weights)
    start = 0
    for slot, count in enumerate(counts):
        for row in (start, start + count // 2, start + count - 1):
            alone = torch.zeros(3, dtype=torch.int64)
            alone[slot] = 1
            y = grouped_experts(x[row : row + 1], alone, weights)
            assert torch.equal(y[0], whole[row])
        start += count


def test_auto_chooses_by_size_and_type_alone(layer_of: Maker) -> None:
    for dtype, largest in LARGEST_EXPERT.items():
        width = largest // 64
        assert small_preferred(width, 64, dtype)
        assert not small_preferred(width + 1, 64, dtype)
    assert not small_preferred(8, 8, torch.float64)
    assert layer_of(2, 64, 32, torch.bfloat16).weights().backend == "small"
    assert layer_of(2, 64, 32, torch.float16).weights().backend == "torch"


def test_a_machine_without_fused_products_takes_another_backend(
    layer_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_small, "HAS_FUSED_PRODUCTS", False)
    layer = layer_of(2, 64, 32, torch.float32)
    assert layer.weights().backend == "packed"
    with pytest.raises(InputError, match="'small' cannot run"):
        layer.weights("small")


def test_not_a_number_in_a_weight_comes_back_bit_for_bit(layer_of: Maker) -> None:
    layer = layer_of(1, 8, 4, torch.bfloat16)
    bits = torch.tensor([0x7FC1, 0x7F81, -1, 0x7F80], dtype=torch.int16)
    layer.experts[0]["down"].view(torch.int16)[0] = bits
    returned = layer.weights("small").get_slot(0)["down"]
    assert torch.equal(returned.view(torch.int16)[0], bits)
