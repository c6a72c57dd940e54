"""Products of rows with small matrices held as float32 panels, in one compiled pass.

A matrix [N, K] is stored as panels of PANEL columns, so that a tile of rows times one panel stays
in registers. Every output is one chain of fused multiply-adds over k = 0, 1, ..., starting from
the bias: its bits depend on its own row and column only. Knows numpy arrays; knows nothing of
tensors or backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .cpu_float import compiled, store, to_float
from .cpu_loops import activate_rows

Array = Any  # numpy arrays inside compiled loops; numba infers their types

_FEATURES = llvm.get_host_cpu_features()
# Without the instruction, every step of a chain would be a function call.
HAS_FUSED_PRODUCTS = bool(_FEATURES.get("fma", False))
_WIDE = bool(_FEATURES.get("avx512f", False))
# Six rows of accumulators, one panel wide, fill the registers of either kind.
_LANES, _VECTORS = (16, 4) if _WIDE else (8, 2)
PANEL = _LANES * _VECTORS
# Rows that pass through both products together: their buffers stay in a second-level cache.
CHUNK_ROWS = 256


_VECTOR = ir.VectorType(ir.FloatType(), _LANES)


def _at(builder: Any, address: Any, element: Any, kind: Any) -> Any:
    """A pointer to the given float of an array, by its address."""
    offset = builder.mul(element, element.type(4))
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _load_vector(builder: Any, address: Any, element: Any) -> Any:
    loaded = builder.load(_at(builder, address, element, _VECTOR))
    loaded.align = 4
    return loaded


def _load_spread(builder: Any, address: Any, element: Any) -> Any:
    """One float in every lane."""
    scalar = builder.load(_at(builder, address, element, ir.FloatType()))
    integer = ir.IntType(32)
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, integer(0))
    first_lane = ir.Constant(ir.VectorType(integer, _LANES), [0] * _LANES)
    return builder.shuffle_vector(one, one, first_lane)


def _fused(builder: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    name = f"llvm.fma.v{_LANES}f32"
    return cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]


def _tile_product(rows: int) -> Any:
    """`rows` rows of x times one panel, into `rows` rows of out.

    Arguments are addresses: x (float32, row after row of `depth`), panel [depth, PANEL], bias
    [PANEL], out and the step between its rows in elements.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, depth, panel, bias, out, out_step = arguments
        fused, index = _fused(builder), depth.type
        columns = [index(v * _LANES) for v in range(_VECTORS)]
        starts = [_load_vector(builder, bias, column) for column in columns]
        # Memory in name only: LLVM keeps these in registers.
        sums = [[_held(builder, start) for start in starts] for _ in range(rows)]
        with cgutils.for_range(builder, depth) as loop:
            first = builder.mul(loop.index, index(PANEL))
            weights = [_load_vector(builder, panel, builder.add(first, c)) for c in columns]
            for r in range(rows):
                element = builder.add(builder.mul(depth, index(r)), loop.index)
                value = _load_spread(builder, x, element)
                for weight, total in zip(weights, sums[r], strict=True):
                    terms = (value, weight, builder.load(total))
                    builder.store(builder.call(fused, terms), total)
        for r in range(rows):
            for column, total in zip(columns, sums[r], strict=True):
                element = builder.add(builder.mul(out_step, index(r)), column)
                stored = builder.store(builder.load(total), _at(builder, out, element, _VECTOR))
                stored.align = 4
        return context.get_dummy_value()

    def typed(
        typing_context: Any, x: Any, depth: Any, panel: Any, bias: Any, out: Any, step: Any
    ) -> tuple[Any, Callable[..., Any]]:
        return types.void(*[types.intp] * 6), emit

    return intrinsic(typed)


def _held(builder: Any, value: Any) -> Any:
    return cgutils.alloca_once_value(builder, value)  # type: ignore[no-untyped-call]


_tile_6: Any = _tile_product(6)
_tile_5: Any = _tile_product(5)
_tile_4: Any = _tile_product(4)
_tile_3: Any = _tile_product(3)
_tile_2: Any = _tile_product(2)
_tile_1: Any = _tile_product(1)


@compiled
def _panel_product(
    rows: int, x: int, depth: int, panel: int, bias: int, out: int, step: int
) -> None:
    """All rows of one segment times one panel; arguments as in `_tile_product`."""
    while rows >= 6:
        _tile_6(x, depth, panel, bias, out, step)
        x, out, rows = x + 6 * 4 * depth, out + 6 * 4 * step, rows - 6
    if rows == 5:
        _tile_5(x, depth, panel, bias, out, step)
    elif rows == 4:
        _tile_4(x, depth, panel, bias, out, step)
    elif rows == 3:
        _tile_3(x, depth, panel, bias, out, step)
    elif rows == 2:
        _tile_2(x, depth, panel, bias, out, step)
    elif rows == 1:
        _tile_1(x, depth, panel, bias, out, step)


@compiled
def segment_products(
    x_RK: Array, offset_S: Array, first: int, held_S: Array, panels: Array, bias: Array, out: Array
) -> None:
    """out[r] = x[r] times the matrix of its slot, plus bias, for the rows first, first + 1, ...

    x_RK, out: float32, len(x_RK) rows, out as wide as all panels. offset_S: [S + 1] rows of all
    slots. held_S: which matrix each slot reads. panels [matrices, P, K, PANEL], bias
    [matrices, P * PANEL].
    """
    count, depth = x_RK.shape
    step = out.shape[1]
    for s in range(len(offset_S) - 1):
        start = max(offset_S[s] - first, 0)
        rows = min(offset_S[s + 1] - first, count) - start
        if rows > 0:
            for p in range(panels.shape[1]):
                _panel_product(
                    rows,
                    x_RK[start:].ctypes.data,
                    depth,
                    panels[held_S[s], p].ctypes.data,
                    bias[held_S[s], p * PANEL :].ctypes.data,
                    out[start:, p * PANEL :].ctypes.data,
                    step,
                )


@compiled
def expert_rows(
    x_TH: Array,
    order_A: Array,
    choices: int,
    offset_S: Array,
    held_S: Array,
    up: tuple[Array, Array],
    down: tuple[Array, Array],
    activation: tuple[int, Any, Any],
    scratch: tuple[Array, Array, Array, Array],
    y_AH: Array,
) -> None:
    """Row a of y: token order_A[a] // choices through the expert of its slot.

    up, down: panels and bias of every matrix. activation: kind, limit, alpha. scratch: float32
    [CHUNK_ROWS, ...] for rows of x, gate and up, act, and y, widths padded to panels.
    """
    kind, limit, alpha = activation
    total, hidden = offset_S[len(offset_S) - 1], x_TH.shape[1]
    for first in range(0, total, CHUNK_ROWS):
        rows = min(total - first, CHUNK_ROWS)
        x, gate_up, act, y = scratch[0][:rows], scratch[1][:rows], scratch[2][:rows], scratch[3]
        for r in range(rows):
            token = order_A[first + r] // choices
            for h in range(hidden):
                x[r, h] = to_float(x_TH[token, h])
        segment_products(x, offset_S, first, held_S, up[0], up[1], gate_up)
        activate_rows(kind, gate_up, limit, alpha, act)
        segment_products(act, offset_S, first, held_S, down[0], down[1], y[:rows])
        for r in range(rows):
            for h in range(hidden):
                store(y_AH, first + r, h, y[r, h])


def padded_columns(columns: int) -> int:
    """Columns of a matrix rounded up to whole panels."""
    return -(-columns // PANEL) * PANEL


def to_panels(matrix_NK: np.ndarray[Any, Any], panels: np.ndarray[Any, Any]) -> None:
    """Write a float32 matrix [N, K] into its panels [P, K, PANEL], zero past its columns."""
    columns, depth = matrix_NK.shape
    padded = np.zeros((padded_columns(columns), depth), np.float32)
    padded[:columns] = matrix_NK
    panels[:] = padded.reshape(-1, PANEL, depth).transpose(0, 2, 1)


def from_panels(panels: np.ndarray[Any, Any], columns: int) -> np.ndarray[Any, Any]:
    """The float32 matrix [columns, K] that `to_panels` wrote, as a new array."""
    wide = panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])
    return np.ascontiguousarray(wide[:columns])
