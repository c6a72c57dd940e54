"""The packed CPU backend: when it is chosen, what it falls back to, and its compiled gates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.rank_layer import rank_layer
from loadmaster.kernels import weights
from loadmaster.kernels.cpu import packed
from loadmaster.kernels.cpu.huge_pages import use_huge_pages
from loadmaster.kernels.cpu.loops import (
    combine_rows,
    gelu_rows,
    gelu_tanh_rows,
    gptoss_rows,
    relu_rows,
    silu_rows,
)
from loadmaster.kernels.cpu.packed import packed_available
from loadmaster.kernels.cpu.scalars import as_array, rounded_by_hand
from loadmaster.kernels.cpu.tiles import HAS_WIDE_VECTORS

Maker = Callable[..., Any]

LIMIT, ALPHA = np.float32(7.0), np.float32(1.702)


def test_packing_is_found_on_this_build() -> None:
    """oneDNN packs bfloat16 for 512-bit vectors; on narrower ones it depends on the processor."""
    assert packed_available(torch.float32)
    assert packed_available(torch.bfloat16) or not HAS_WIDE_VECTORS
    assert not packed_available(torch.float16)


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_without_the_private_operators_auto_takes_plain_torch(
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    layer_of: Maker,
    ids_of: Maker,
    rows_of: Maker,
    gates_of: Maker,
) -> None:
    layer = layer_of(3, 24, 16, torch.float32)
    x, ids, gate = rows_of(20, 24, torch.float32), ids_of(20, 2, 3), gates_of(20, 2)
    monkeypatch.setattr(weights, "panels_available", lambda dtype: False)
    laid_out = layer.weights("auto")
    assert laid_out.backend == "packed"
    expected = rank_layer(x, ids, gate, laid_out)

    class Without:
        def __getattr__(self, name: str) -> object:
            if name == missing:
                raise AttributeError(name)
            return getattr(torch.ops.mkldnn, name)

    class Operators:
        mkldnn = Without()

    class Torch:
        ops = Operators()

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr(packed, "torch", Torch())
    packed_available.cache_clear()
    try:
        assert not packed_available(torch.float32)
        plain = layer.weights("auto")
        assert plain.backend == "torch"
        out = rank_layer(x, ids, gate, plain)
    finally:
        monkeypatch.undo()
        packed_available.cache_clear()
    torch.testing.assert_close(out, expected)


def test_a_build_that_multiplies_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "packed_linear", lambda x, packed, bias: x[:, :24] * 0)
    packed_available.cache_clear()
    try:
        assert not packed_available(torch.float32)
    finally:
        packed_available.cache_clear()


def test_float64_and_float16_run_on_plain_torch(
    layer_of: Maker, ids_of: Maker, gates_of: Maker, rows_of: Maker
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float16, 2e-3)):
        layer = layer_of(3, 24, 16, dtype)
        weights = layer.weights()
        assert weights.backend == "torch"
        x, ids, gate = rows_of(9, 24, dtype), ids_of(9, 2, 3), gates_of(9, 2)
        expected = layer.oracle(x, ids, gate)
        error = (rank_layer(x, ids, gate, weights).double() - expected).norm() / expected.norm()
        assert error <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (silu_rows, lambda gate, up: gate * torch.sigmoid(gate) * up),
        (relu_rows, lambda gate, up: gate.clamp(min=0) * up),
        (
            gelu_tanh_rows,
            lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
        ),
        (gelu_rows, lambda gate, up: torch.nn.functional.gelu(gate) * up),
        (
            gptoss_rows,
            lambda gate, up: (
                (up.clamp(-7, 7) + 1)
                * gate.clamp(max=7)
                * torch.sigmoid(float(ALPHA) * gate.clamp(max=7))
            ),
        ),
    ],
    ids=["silu", "relu", "gelu_tanh", "gelu", "gptoss"],
)
def test_compiled_gates_follow_their_definition_from_tiny_to_huge(
    rows: Maker, expected: Maker, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 6, 61)
    gate_up = torch.cat((sizes, -sizes, torch.randn(200, generator=generator)))
    gate_up_row = torch.cat((gate_up, gate_up)).to(dtype)[None]
    out = torch.empty(1, gate_up_row.shape[1] // 2, dtype=dtype)
    rows(as_array(gate_up_row), LIMIT, ALPHA, as_array(out))
    half = out.shape[1]
    gate, up = gate_up_row[:, :half].double(), gate_up_row[:, half:].double()
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    # Relative to the factors: where f(gate) nearly cancels, so do its last digits.
    allowed = tolerance * gate.abs() * (up.abs() + 1) + 1e-20
    assert ((out.double() - expected(gate, up)).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gates_keep_nan_and_infinity(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    gate_up = torch.tensor([[nan, 1.0, inf, -inf, 1.0, nan, 2.0, 2.0]], dtype=dtype)
    out = torch.empty(1, 4, dtype=dtype)
    silu_rows(as_array(gate_up), LIMIT, ALPHA, as_array(out))
    assert out[0, :2].isnan().all()
    assert out[0, 2] == inf
    assert out[0, 3] <= 0 or out[0, 3].isnan()


def test_huge_pages_leave_contents_alone() -> None:
    block = torch.arange(1 << 20, dtype=torch.int32)
    assert use_huge_pages(block.data_ptr(), block.numel() * 4) in (True, False)
    assert torch.equal(block, torch.arange(1 << 20, dtype=torch.int32))
    assert not use_huge_pages(block.data_ptr(), 0)


def test_rounding_by_hand_is_the_machines_rounding() -> None:
    """Both round to nearest even, as torch does; NaN and infinity stay what they are."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=generator).to(torch.int32)
    values = torch.cat((bits.view(torch.float32), torch.tensor([torch.inf, -torch.inf, 0.0])))
    values = values[(values.abs() > 1e-37) | (values == 0) | values.isnan()]
    expected = values.bfloat16()
    by_hand = torch.tensor([int(rounded_by_hand(np.float32(v))) for v in values.tolist()])
    in_use = torch.empty(1, len(values), dtype=torch.bfloat16)
    combine_rows(
        as_array(values[None]),
        np.zeros((1, 1), np.int64),
        np.ones((1, 1), np.float32),
        np.empty(len(values), np.float32),
        as_array(in_use),
    )
    rounded = by_hand.to(torch.uint16).view(torch.bfloat16)
    assert torch.equal(rounded.isnan(), values.isnan())
    assert torch.equal(in_use[0].isnan(), values.isnan())
    real = ~values.isnan()
    assert torch.equal(rounded[real], expected[real])
    assert torch.equal(in_use[0][real], expected[real])
