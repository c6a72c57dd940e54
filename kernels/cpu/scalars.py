"""Scalars inside compiled CPU loops: bfloat16 as raw bits, and an exponential that vectorises.

numba knows no bfloat16, so its arrays come as uint16 bits and pass through here; the same loop
then serves float32 and bfloat16. Knows nothing of what the loops compute.

Every function is elementwise and branch-free, so an element's bits never depend on where in a
vector it sits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

from ...foundation.compiled import compiled_fused, compiles_for

_F32 = np.float32


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The numpy view of a CPU tensor; bfloat16 becomes its raw bits in uint16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array


def _emit_bitcast(target: Any) -> Callable[..., Any]:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], target)

    return emit


def _bits_to_float(typing_context: Any, bits: Any) -> Any:
    return types.float32(types.uint32), _emit_bitcast(ir.FloatType())


def _float_to_bits(typing_context: Any, value: Any) -> Any:
    return types.uint32(types.float32), _emit_bitcast(ir.IntType(32))


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


def _round_to_bfloat16(typing_context: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], _BFloat16()), ir.IntType(16))

    return types.uint16(types.float32), emit


bits_to_float: Any = intrinsic(_bits_to_float)
float_to_bits: Any = intrinsic(_float_to_bits)
# One instruction where the machine has it; elsewhere LLVM would call a function that is not there.
_HAS_ROUNDING = compiles_for("avx512bf16")
_rounded_by_machine: Any = intrinsic(_round_to_bfloat16)


def _rounded_by_hand(value: Any) -> Any:
    """bfloat16 bits of a float32, to nearest even; NaN stays NaN."""
    bits = float_to_bits(value)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    nearest = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    # Rounding up would carry some NaNs over into infinity.
    return np.uint16(nearest if value == value else np.uint32(0x7FC0))


rounded_by_hand: Any = compiled_fused(_rounded_by_hand)
to_bfloat16: Any = _rounded_by_machine if _HAS_ROUNDING else rounded_by_hand


def to_float(element: Any) -> Any:
    """An array element as float32: bfloat16 bits are widened, float32 is itself."""
    if isinstance(element, np.uint16):
        return np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)
    return element


def store(array: Any, row: int, column: int, value: Any) -> None:
    """Write a float32 into an array, rounding to nearest even for bfloat16 bits."""
    if array.dtype == np.uint16:
        array[row, column] = torch.tensor(float(value)).bfloat16().view(torch.uint16).item()
    else:
        array[row, column] = value


def put(array: Any, row: int, column: int, element: Any) -> None:
    """Write an element as it is, or widened where the array holds float32."""
    array[row, column] = to_float(element) if array.dtype == np.float32 else element


def _put_overload(array: Any, row: Any, column: Any, element: Any) -> Any:
    if array.dtype == types.float32:

        def widened(array: Any, row: Any, column: Any, element: Any) -> None:
            array[row, column] = to_float(element)

        return widened

    def plain(array: Any, row: Any, column: Any, element: Any) -> None:
        array[row, column] = element

    return plain


def _to_float_overload(element: Any) -> Any:
    if element == types.uint16:

        def widened(element: Any) -> Any:
            return bits_to_float(np.uint32(np.uint32(element) << np.uint32(16)))

        return widened

    def itself(element: Any) -> Any:
        return element

    return itself


def _store_overload(array: Any, row: Any, column: Any, value: Any) -> Any:
    if array.dtype == types.uint16:

        def rounded(array: Any, row: Any, column: Any, value: Any) -> None:
            array[row, column] = to_bfloat16(value)

        return rounded

    def plain(array: Any, row: Any, column: Any, value: Any) -> None:
        array[row, column] = value

    return plain


overload(to_float)(_to_float_overload)
overload(put)(_put_overload)
overload(store)(_store_overload)


@compiled_fused
def exp(x: Any) -> Any:
    """e**x in float32, within two units in the last place; saturates outside [-87, 88].

    Splits x into n ln 2 + r with |r| <= ln 2 / 2, sums a polynomial in r, scales by 2**n.
    NaN stays NaN.
    """
    x = _F32(-87.0) if x < _F32(-87.0) else x
    x = _F32(88.0) if x > _F32(88.0) else x
    # Adding 1.5 * 2**23 leaves round(x / ln 2) in the low bits, with no float-to-int conversion
    # (which NaN would make undefined).
    shifted = x * _F32(1.44269504) + _F32(12582912.0)
    n = shifted - _F32(12582912.0)
    # ln 2 in two parts, the first short enough that n times it is exact.
    r = x - n * _F32(0.693359375)
    r = r + n * _F32(2.12194440e-4)
    p = _F32(1.0 / 5040.0)
    p = p * r + _F32(1.0 / 720.0)
    p = p * r + _F32(1.0 / 120.0)
    p = p * r + _F32(1.0 / 24.0)
    p = p * r + _F32(1.0 / 6.0)
    p = p * r + _F32(0.5)
    p = p * r + _F32(1.0)
    p = p * r + _F32(1.0)
    power_bits = (float_to_bits(shifted) << np.uint32(23)) + np.uint32(0x3F800000)
    return p * bits_to_float(np.uint32(power_bits))


@compiled_fused
def exp_short(x: Any) -> Any:
    """`exp` with a shorter polynomial: relative error below 1e-5, far under bfloat16's 4e-3."""
    x = _F32(-87.0) if x < _F32(-87.0) else x
    x = _F32(88.0) if x > _F32(88.0) else x
    shifted = x * _F32(1.44269504) + _F32(12582912.0)
    n = shifted - _F32(12582912.0)
    r = x - n * _F32(0.69314718)
    p = _F32(1.0 / 120.0)
    p = p * r + _F32(1.0 / 24.0)
    p = p * r + _F32(1.0 / 6.0)
    p = p * r + _F32(0.5)
    p = p * r + _F32(1.0)
    p = p * r + _F32(1.0)
    power_bits = (float_to_bits(shifted) << np.uint32(23)) + np.uint32(0x3F800000)
    return p * bits_to_float(np.uint32(power_bits))


def times_sigmoid(element: Any, gate: float, x: float) -> float:
    """gate / (1 + e**-x), as exactly as the type of `element` (an array's) can hold."""
    return float(gate / (1.0 + np.exp(-x)))


def _times_sigmoid_overload(element: Any, gate: Any, x: Any) -> Any:
    if element == types.uint16:

        def short(element: Any, gate: Any, x: Any) -> Any:
            return gate / (_F32(1.0) + exp_short(-x))

        return short

    def full(element: Any, gate: Any, x: Any) -> Any:
        return gate / (_F32(1.0) + exp(-x))

    return full


overload(times_sigmoid)(_times_sigmoid_overload)


@compiled_fused
def erf(x: Any) -> Any:
    """The error function in float32, within a few units in the last place.

    A ratio of polynomials in x**2 (the minimax coefficients are Eigen's) up to |x| = 3.83, from
    where erf is 1 in float32. NaN stays NaN.
    """
    bound = _F32(3.8325069)
    square = x * x
    square = bound * bound if square > bound * bound else square
    p = _F32(-2.72614225801306e-10)
    p = p * square + _F32(2.77068142495902e-08)
    p = p * square + _F32(-2.10102402082508e-06)
    p = p * square + _F32(-5.69250639462346e-05)
    p = p * square + _F32(-7.34990630326855e-04)
    p = p * square + _F32(-2.95459980854025e-03)
    p = p * square + _F32(-1.60960333262415e-02)
    q = _F32(-1.45660718464996e-05)
    q = q * square + _F32(-2.13374055278905e-04)
    q = q * square + _F32(-1.68282697438203e-03)
    q = q * square + _F32(-7.37332916720468e-03)
    q = q * square + _F32(-1.42647390514189e-02)
    ratio = x * p / q
    ratio = _F32(1.0) if x > bound else ratio
    return _F32(-1.0) if x < -bound else ratio
