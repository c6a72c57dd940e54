"""Experts held as panels, in one compiled pass over all rows of a step.

Per expert: widen its rows, then panel by panel the gate and up products, the activation while
both are in cache, and the down product. Knows numpy arrays and slots; knows nothing of tensors
or of how panels multiply.
"""

from __future__ import annotations

from typing import Any

from ...foundation.compiled import compiled_fused
from .loops import activate_rows
from .scalars import put, store
from .tiles import PANEL, panel_product

Array = Any  # numpy arrays inside compiled loops; numba infers their types

# Rows of one expert that pass through both products together: enough to read its weights rarely,
# few enough that they and their activations stay near.
CHUNK_ROWS = 512


@compiled_fused
def expert_rows(
    x_AH: Array,
    offset_S: Array,
    up: tuple[Array, Array],
    down: tuple[Array, Array],
    activation: tuple[int, Any, Any],
    scratch: tuple[Array, Array, Array, Array],
    y_AH: Array,
) -> None:
    """Every row of y: that row of x through the expert of its slot.

    offset_S: [S + 1] first row of every slot. up, down: panels [S, P, depth, PANEL] and bias
    [S, P * PANEL]; the panels of all gate columns stand before those of all up columns.
    activation: kind, limit, alpha. scratch: four arrays of CHUNK_ROWS rows: x, as wide as the up
    panels are deep; float32 [2 * PANEL]; [PANEL]; act, as wide as the down panels are deep. All
    but the second have the type that rows are multiplied in: that of x_AH, or float32.
    """
    x, gate_up, block, act = scratch
    for s in range(len(offset_S) - 1):
        for first in range(offset_S[s], offset_S[s + 1], CHUNK_ROWS):
            rows = min(offset_S[s + 1] - first, CHUNK_ROWS)
            _widen(x_AH[first : first + rows], x)
            _gate_and_up(
                x[:rows], up[0][s], up[1][s], activation, gate_up[:rows], block[:rows], act[:rows]
            )
            _down(act[:rows], down[0][s], down[1][s], gate_up[:rows], y_AH[first : first + rows])


@compiled_fused
def dense_rows(
    x_RK: Array, panels: Array, bias: Array, scratch: tuple[Array, Array], y_RN: Array
) -> None:
    """y = x times one matrix, plus bias. scratch: CHUNK_ROWS rows as deep as the panels, of the
    type rows are multiplied in; and float32 [CHUNK_ROWS, PANEL]."""
    x, block = scratch
    for first in range(0, len(x_RK), CHUNK_ROWS):
        rows = min(len(x_RK) - first, CHUNK_ROWS)
        _widen(x_RK[first : first + rows], x)
        _down(x[:rows], panels, bias, block[:rows], y_RN[first : first + rows])


@compiled_fused
def _widen(rows_RH: Array, x_RK: Array) -> None:
    """The rows in the type they are multiplied in; x_RK may have a column more, which is zero."""
    hidden = rows_RH.shape[1]
    for r in range(len(rows_RH)):
        for h in range(hidden):
            put(x_RK, r, h, rows_RH[r, h])
        for h in range(hidden, x_RK.shape[1]):
            x_RK[r, h] = 0


@compiled_fused
def _gate_and_up(
    x_RK: Array, panels: Array, bias: Array, activation: Any,
    gate_up: Array, block: Array, act_RI: Array,
) -> None:
    """act = f(gate, up), one panel of each at a time."""
    kind, limit, alpha = activation
    half, width = len(panels) // 2, act_RI.shape[1]
    for p in range(half):
        panel_product(x_RK, panels[p], bias[p * PANEL :], gate_up, 0)
        panel_product(x_RK, panels[half + p], bias[(half + p) * PANEL :], gate_up, PANEL)
        activate_rows(kind, gate_up, limit, alpha, block)
        columns = min(width - p * PANEL, PANEL)
        for r in range(len(act_RI)):
            for c in range(columns):
                act_RI[r, p * PANEL + c] = block[r, c]


@compiled_fused
def _down(act_RI: Array, panels: Array, bias: Array, block: Array, y_RH: Array) -> None:
    """y = act times the panels, plus bias, one panel at a time, rounded once."""
    for p in range(len(panels)):
        panel_product(act_RI, panels[p], bias[p * PANEL :], block, 0)
        columns = min(y_RH.shape[1] - p * PANEL, PANEL)
        for r in range(len(y_RH)):
            for c in range(columns):
                store(y_RH, r, p * PANEL + c, block[r, c])
