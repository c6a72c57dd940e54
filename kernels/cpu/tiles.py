"""Rows times a matrix held in panels: register tiles written in LLVM's own vectors.

A matrix [N, K] is stored as panels of PANEL columns, so that a tile of rows times one panel stays
in registers while the panel streams by once. Its 32-bit words hold one float32, or two bfloat16
values of neighbouring k. Machines that multiply such pairs take rows in pairs, too; others take
float32 rows and widen the panel's pairs on the way, two instructions for twelve products. Every
output is its bias plus, in order of k, the sums of blocks, each one chain of fused multiply-adds:
its bits depend on its own row and column only. Knows addresses and numpy arrays; knows nothing of
experts or tensors.
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
from numpy.typing import NDArray

from ...foundation.compiled import compiled_fused, compiles_for

# Without the instruction, every step of a chain would be a function call.
HAS_FUSED_PRODUCTS = compiles_for("fma")
HAS_PAIR_PRODUCTS = compiles_for("avx512bf16")
# With matrix units, oneDNN multiplies large bfloat16 matrices several times faster than vectors.
HAS_MATRIX_UNITS = bool(llvm.get_host_cpu_features().get("amx-bf16", False))
# TILE_ROWS rows of accumulators, one panel wide, fill the registers of either kind.
HAS_WIDE_VECTORS = compiles_for("avx512f")
_LANES, _VECTORS = (16, 4) if HAS_WIDE_VECTORS else (8, 2)
PANEL = _LANES * _VECTORS
TILE_ROWS = 6
# Depth of one chain: short ones keep float32 errors small, and their weights in the nearest cache.
BLOCK_WORDS = 512

_INTEGER = ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_WORDS = ir.VectorType(_INTEGER, _LANES)


class _BFloats(ir.Type):  # type: ignore[misc]
    """A vector of LLVM's bfloat, which llvmlite does not name: two to a word."""

    def _to_string(self) -> str:
        return f"<{2 * _LANES} x bfloat>"


_PAIRS = _BFloats()


def _at(builder: Any, address: Any, word: Any, kind: Any) -> Any:
    """A pointer to the given 32-bit word after an address."""
    offset = builder.mul(word, word.type(4))
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _load(builder: Any, address: Any, word: Any, kind: Any) -> Any:
    loaded = builder.load(_at(builder, address, word, kind))
    loaded.align = 4
    return loaded


def _load_spread(builder: Any, address: Any, word: Any) -> Any:
    """One word in every lane."""
    value = _load(builder, address, word, _INTEGER)
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), value, _INTEGER(0))
    return builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * _LANES))


def _halves(builder: Any, words: Any) -> tuple[Any, Any]:
    """Both bfloat16 values of every word as float32: the one of the lower k first."""
    low = builder.shl(words, ir.Constant(_WORDS, [16] * _LANES))
    high = builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * _LANES))
    return low, high


def _step(builder: Any, pairs: bool) -> Callable[[Any, Any, Any], Any]:
    """(total, words of x, words of the panel) -> total with their products added."""
    factor = _PAIRS if pairs else _FLOATS
    arguments = [_FLOATS, factor, factor] if pairs else [factor, factor, _FLOATS]
    name = "llvm.x86.avx512bf16.dpbf16ps.512" if pairs else f"llvm.fma.v{_LANES}f32"
    kind = ir.FunctionType(_FLOATS, arguments)
    function = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]

    def add(total: Any, x: Any, panel: Any) -> Any:
        x, panel = builder.bitcast(x, factor), builder.bitcast(panel, factor)
        return builder.call(function, (total, x, panel) if pairs else (x, panel, total))

    return add


def _held(builder: Any, value: Any) -> Any:
    """A variable; memory in name only, LLVM keeps it in a register."""
    return cgutils.alloca_once_value(builder, value)  # type: ignore[no-untyped-call]


def _tile_product(rows: int) -> Any:
    """`rows` rows of x times one block of a panel, added to `rows` rows of start, into out.

    Arguments: any element of the panel and of x, whose types say what their words hold; then
    addresses, each but the panel's followed by the step between its rows in words: x, start, out,
    panel; last the depth of the block in words of the panel.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, x, x_step, start, start_step, out, out_step, panel, depth = arguments
        paired = signature.args[0] == types.uint32
        widened = paired and signature.args[1] == types.float32
        add, index = _step(builder, paired and not widened), depth.type
        columns = [index(v * _LANES) for v in range(_VECTORS)]
        zero = ir.Constant(_FLOATS, [0.0] * _LANES)
        sums = [[_held(builder, zero) for _ in columns] for _ in range(rows)]
        with cgutils.for_range(builder, depth) as loop:
            first = builder.mul(loop.index, index(PANEL))
            words = [_load(builder, panel, builder.add(first, c), _WORDS) for c in columns]
            if widened:
                depths = list(zip(*(_halves(builder, w) for w in words), strict=True))
            else:
                depths = [tuple(words)]
            for k, factors in enumerate(depths):
                x_word = builder.add(builder.mul(loop.index, index(len(depths))), index(k))
                for r in range(rows):
                    in_row = builder.add(builder.mul(x_step, index(r)), x_word)
                    value = _load_spread(builder, x, in_row)
                    for factor, total in zip(factors, sums[r], strict=True):
                        builder.store(add(builder.load(total), value, factor), total)
        for r in range(rows):
            for column, total in zip(columns, sums[r], strict=True):
                before = builder.add(builder.mul(start_step, index(r)), column)
                after = builder.add(builder.mul(out_step, index(r)), column)
                value = builder.fadd(_load(builder, start, before, _FLOATS), builder.load(total))
                builder.store(value, _at(builder, out, after, _FLOATS)).align = 4
        return context.get_dummy_value()

    def typed(
        typing_context: Any, word: Any, element: Any, x: Any, x_step: Any, start: Any,
        start_step: Any, out: Any, out_step: Any, panel: Any, depth: Any,
    ) -> tuple[Any, Callable[..., Any]]:
        return types.void(word, element, *[types.intp] * 8), emit

    return intrinsic(typed)


_tile_6: Any = _tile_product(6)
_tile_5: Any = _tile_product(5)
_tile_4: Any = _tile_product(4)
_tile_3: Any = _tile_product(3)
_tile_2: Any = _tile_product(2)
_tile_1: Any = _tile_product(1)


@compiled_fused
def _rows_product(
    word: Any, element: Any, rows: int, x: int, x_step: int, start: int, start_step: int,
    out: int, out_step: int, panel: int, depth: int,
) -> None:
    """Any number of rows times one block of a panel; the other arguments as in `_tile_product`."""
    while rows >= TILE_ROWS:
        _tile_6(word, element, x, x_step, start, start_step, out, out_step, panel, depth)
        x, start, out = x + 24 * x_step, start + 24 * start_step, out + 24 * out_step
        rows -= TILE_ROWS
    if rows == 5:
        _tile_5(word, element, x, x_step, start, start_step, out, out_step, panel, depth)
    elif rows == 4:
        _tile_4(word, element, x, x_step, start, start_step, out, out_step, panel, depth)
    elif rows == 3:
        _tile_3(word, element, x, x_step, start, start_step, out, out_step, panel, depth)
    elif rows == 2:
        _tile_2(word, element, x, x_step, start, start_step, out, out_step, panel, depth)
    elif rows == 1:
        _tile_1(word, element, x, x_step, start, start_step, out, out_step, panel, depth)


@compiled_fused
def panel_product(x_RK: Any, panel: Any, bias: Any, out: Any, column: int) -> None:
    """out[:, column : column + PANEL] = x times one panel, plus bias; for compiled callers.

    x_RK: contiguous rows as wide as the panel is deep: float32, or bits of bfloat16, two to a
    word, where the machine multiplies pairs. panel [depth, PANEL]: float32, or uint32 for pairs.
    bias [PANEL] and out: float32.
    """
    words, step = len(panel), out.shape[1]
    x_words = x_RK.shape[1] * x_RK.itemsize // 4
    target = out[:, column:].ctypes.data
    start, start_step = bias.ctypes.data, 0
    for first in range(0, words, BLOCK_WORDS):
        _rows_product(
            panel[0, 0],
            x_RK[0, 0],
            len(x_RK),
            x_RK.ctypes.data + 4 * first * (x_words // words),
            x_words,
            start,
            start_step,
            target,
            step,
            panel.ctypes.data + 4 * PANEL * first,
            min(words - first, BLOCK_WORDS),
        )
        start, start_step = target, step


def padded_columns(columns: int) -> int:
    """Columns of a matrix rounded up to whole panels."""
    return -(-columns // PANEL) * PANEL


@compiled_fused
def to_panels(word_NK: Any, panels: Any) -> None:
    """Write the words of a matrix [N, K] into panels [P, K, PANEL], zero past its columns."""
    columns, depth = word_NK.shape
    for p in range(len(panels)):
        # One cache line of every row at a time: rows a power of two apart evict each other.
        for first in range(0, depth, 16):
            for c in range(PANEL):
                n = p * PANEL + c
                for k in range(first, min(first + 16, depth)):
                    panels[p, k, c] = word_NK[n, k] if n < columns else 0


def from_panels(panels: NDArray[Any], columns: int) -> NDArray[Any]:
    """The words [columns, K] that `to_panels` wrote, as a new array."""
    wide = panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])
    return np.ascontiguousarray(wide[:columns])
