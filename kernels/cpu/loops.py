"""The compiled CPU loops of one expert layer: counting sort by slot, gate, combine.

Plain loops over numpy arrays, one pass each; knows nothing of tensors, packed weights or errors:
`routing.py` and `gates.py` check, convert and call. bfloat16 arrays come as uint16 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.compiled import compiled_fused
from .scalars import erf, store, times_sigmoid, to_float

Array = Any  # numpy arrays inside compiled loops; numba infers their types
_F32 = np.float32


@compiled_fused
def sort_slots(slot_A: Array, order_A: Array, offset_S: Array, row_A: Array) -> None:
    """Counting sort by slot, stable; slots outside [0, S) are left out.

    offset_S: [S + 1] int64, written: first row of each slot. order_A: assignment of each row.
    row_A: row of each assignment, -1 where it was left out.
    """
    slots = len(offset_S) - 1
    offset_S[:] = 0
    for a in range(len(slot_A)):
        if 0 <= slot_A[a] < slots:
            offset_S[slot_A[a] + 1] += 1
    for s in range(slots):
        offset_S[s + 1] += offset_S[s]
    next_row_S = offset_S[:-1].copy()
    for a in range(len(slot_A)):
        s = slot_A[a]
        row_A[a] = -1
        if 0 <= s < slots:
            row_A[a] = next_row_S[s]
            order_A[next_row_S[s]] = a
            next_row_S[s] += 1


# The gated activations: gate and up products [rows, 2I] into the input of the down product
# [rows, I]. limit and alpha are gpt-oss's; the others take and ignore them.


@compiled_fused
def silu_rows(gate_up: Array, limit: Any, alpha: Any, out: Array) -> None:
    """gate * sigmoid(gate) * up."""
    rows, width = out.shape
    for r in range(rows):
        for c in range(width):
            gate, up = to_float(gate_up[r, c]), to_float(gate_up[r, width + c])
            store(out, r, c, times_sigmoid(gate_up[r, c], gate, gate) * up)


@compiled_fused
def relu_rows(gate_up: Array, limit: Any, alpha: Any, out: Array) -> None:
    """max(gate, 0) * up."""
    rows, width = out.shape
    for r in range(rows):
        for c in range(width):
            gate, up = to_float(gate_up[r, c]), to_float(gate_up[r, width + c])
            gate = _F32(0.0) if gate < _F32(0.0) else gate
            store(out, r, c, gate * up)


@compiled_fused
def gelu_tanh_rows(gate_up: Array, limit: Any, alpha: Any, out: Array) -> None:
    """The tanh form of gelu(gate) * up; 0.5 (1 + tanh z) is written as sigmoid(2 z)."""
    rows, width = out.shape
    for r in range(rows):
        for c in range(width):
            gate, up = to_float(gate_up[r, c]), to_float(gate_up[r, width + c])
            twice = _F32(1.59576912) * (gate + _F32(0.044715) * gate * gate * gate)
            store(out, r, c, times_sigmoid(gate_up[r, c], gate, twice) * up)


@compiled_fused
def gelu_rows(gate_up: Array, limit: Any, alpha: Any, out: Array) -> None:
    """0.5 gate (1 + erf(gate / sqrt 2)) * up."""
    rows, width = out.shape
    for r in range(rows):
        for c in range(width):
            gate, up = to_float(gate_up[r, c]), to_float(gate_up[r, width + c])
            store(out, r, c, _F32(0.5) * gate * (_F32(1.0) + erf(gate * _F32(0.70710678))) * up)


@compiled_fused
def gptoss_rows(gate_up: Array, limit: Any, alpha: Any, out: Array) -> None:
    """(up + 1) * gate * sigmoid(alpha * gate), gate <= limit and |up| <= limit."""
    rows, width = out.shape
    for r in range(rows):
        for c in range(width):
            gate, up = to_float(gate_up[r, c]), to_float(gate_up[r, width + c])
            gate = limit if gate > limit else gate
            up = limit if up > limit else up
            up = -limit if up < -limit else up
            glu = times_sigmoid(gate_up[r, c], gate, alpha * gate)
            store(out, r, c, (up + _F32(1.0)) * glu)


@compiled_fused
def activate_rows(kind: int, gate_up: Array, limit: Any, alpha: Any, out: Array) -> None:
    """The activation at place `kind` of ACTIVATIONS, for compiled code that has it as a number."""
    if kind == 0:
        silu_rows(gate_up, limit, alpha, out)
    elif kind == 1:
        gelu_rows(gate_up, limit, alpha, out)
    elif kind == 2:
        gelu_tanh_rows(gate_up, limit, alpha, out)
    elif kind == 3:
        relu_rows(gate_up, limit, alpha, out)
    else:
        gptoss_rows(gate_up, limit, alpha, out)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "gptoss_clamped")


@compiled_fused
def combine_rows(y_AH: Array, row_TK: Array, gate_TK: Array, sum_H: Array, out_TH: Array) -> None:
    """Each token's expert rows, weighted and summed in float32, choice 0 first.

    row_TK: row of y of every choice, negative = left out. sum_H: float32 scratch.
    """
    tokens, choices = row_TK.shape
    hidden = out_TH.shape[1]
    for t in range(tokens):
        sum_H[:] = _F32(0.0)
        for k in range(choices):
            row = row_TK[t, k]
            if row >= 0:
                gate = gate_TK[t, k]
                for h in range(hidden):
                    sum_H[h] += gate * to_float(y_AH[row, h])
        for h in range(hidden):
            store(out_TH, t, h, sum_H[h])
