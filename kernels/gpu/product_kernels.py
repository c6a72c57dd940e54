"""Triton kernels that multiply, written for Hopper.

    up_gated  gate and up products in two accumulators, activation
    down      second product; every row is written once
    reduce    a token's rows, weighted and summed in float32 in its own top-k order

Knows pointers, strides and block sizes only; `backend.py` allocates and launches.

Exactness: in both products weights stand on the M side and tokens on the N side, at every
batch size, so the same matrix instruction walks K in the same order whatever the tile. Nothing is
added atomically; gates are applied in `reduce`, where rows from other ranks are applied too.
float32 is multiplied outside the matrix units, one fused product after another: there every block
of depth is a chain of its own (`_add_product`), or a deep sum would err by more than 1e-6.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gated(
    gate: tl.tensor, up: tl.tensor, limit: tl.tensor, alpha: tl.tensor, KIND: tl.constexpr
) -> tl.tensor:
    """The gated activation in float32."""
    if KIND == "silu":
        return gate * _sigmoid(gate) * up
    elif KIND == "relu":
        return tl.where(gate < 0.0, 0.0, gate) * up
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == "gelu_tanh":
        # 0.5 (1 + tanh z) is sigmoid(2 z)
        return gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, up)
        up = tl.where(up < -limit, -limit, up)
        return (up + 1.0) * gate * _sigmoid(alpha * gate)


@triton.jit
def _add_product(
    a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr, FRESH: tl.constexpr
) -> tl.tensor:
    """total + a b. FRESH: summed from zero, then added; else one chain from `total` on."""
    if FRESH:
        part = tl.dot(a, b, input_precision=PRECISION)
        # A plain sum would be folded back into the product's own accumulator.
        return tl.fma(part, tl.full(part.shape, 1.0, tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _work_item(
    work: tl.tensor, tiles: tl.tensor, columns: tl.tensor, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tile and column block of one piece of work: GROUP tiles wide, all columns, group by group.

    What runs at one time then shares few rows and few experts' weights, and both stay in L2.
    """
    group = work // (GROUP * columns)
    first = group * GROUP
    width = tl.minimum(tiles - first, GROUP)
    inside = work - group * GROUP * columns
    return first + inside % width, inside // width


@triton.jit
def up_gated(
    x: tl.tensor,
    weights: tl.tensor,
    biases: tl.tensor,
    act: tl.tensor,
    row_end: tl.tensor,
    tile_slot: tl.tensor,
    tile_row: tl.tensor,
    tile_count: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    stride_x: tl.tensor,
    limit: tl.tensor,
    alpha: tl.tensor,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """act [A, I] = f(gate(x), up(x)) for every row, persistent over tiles x column blocks.

    weights [S, 2I, H], gate rows first. EVEN: H is a multiple of BLOCK_K, so the loop needs no
    mask; rows and columns past their end read the first one instead and are not stored.
    """
    FRESH: tl.constexpr = weights.dtype.element_ty == tl.float32
    tiles = tl.load(tile_count)
    columns = (intermediate + BLOCK_N - 1) // BLOCK_N
    m = tl.arange(0, BLOCK_ROWS)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for work in range(tl.program_id(0), tiles * columns, tl.num_programs(0)):
        tile, block = _work_item(work, tiles, columns, GROUP)
        column = block * BLOCK_N + n
        slot = tl.load(tile_slot + tile).to(tl.int64)
        row = tl.load(tile_row + tile) + m
        kept = row < tl.load(row_end + slot)
        x_row = tl.where(kept, row, 0).to(tl.int64)
        x_at = x + x_row[None, :] * stride_x + k[:, None]
        within = column < intermediate
        offset = tl.where(within, column, 0).to(tl.int64)[:, None] * hidden + k[None, :]
        # 64 bits wide from slot: a size of 1 is a plain number here, with no type to widen.
        gate_at = weights + 2 * slot * intermediate * hidden + offset
        up_at = weights + (2 * slot + 1) * intermediate * hidden + offset
        gate = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
        for start in range(0, hidden, BLOCK_K):
            if EVEN:
                x_tile = tl.load(x_at)
                gate_tile = tl.load(gate_at)
                up_tile = tl.load(up_at)
            else:
                inside = k < hidden - start
                x_tile = tl.load(x_at, mask=inside[:, None], other=0.0)
                gate_tile = tl.load(gate_at, mask=inside[None, :], other=0.0)
                up_tile = tl.load(up_at, mask=inside[None, :], other=0.0)
            if UPCAST:
                x_tile = x_tile.to(tl.float32)
                gate_tile = gate_tile.to(tl.float32)
                up_tile = up_tile.to(tl.float32)
            gate = _add_product(gate_tile, x_tile, gate, PRECISION, FRESH)
            up = _add_product(up_tile, x_tile, up, PRECISION, FRESH)
            x_at += BLOCK_K
            gate_at += BLOCK_K
            up_at += BLOCK_K
        if HAS_BIAS:
            bias_at = biases + slot * (2 * intermediate) + column
            gate += tl.load(bias_at, mask=within, other=0.0).to(tl.float32)[:, None]
            up += tl.load(bias_at + intermediate, mask=within, other=0.0).to(tl.float32)[:, None]
        value = _gated(gate, up, limit, alpha, KIND)
        act_at = act + row.to(tl.int64)[None, :] * intermediate + column[:, None]
        value = value.to(act.dtype.element_ty)
        tl.store(act_at, value, mask=within[:, None] & kept[None, :])


@triton.jit
def down(
    act: tl.tensor,
    weights: tl.tensor,
    biases: tl.tensor,
    y: tl.tensor,
    row_end: tl.tensor,
    tile_slot: tl.tensor,
    tile_row: tl.tensor,
    tile_count: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    stride_y: tl.tensor,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """y = down(act), unweighted.

    weights [S, H, I]. Every row of y is written by one tile, once per column block. Gates
    are left to `reduce`, so that rows computed here and on another rank round equally.
    """
    FRESH: tl.constexpr = weights.dtype.element_ty == tl.float32
    tiles = tl.load(tile_count)
    columns = (hidden + BLOCK_N - 1) // BLOCK_N
    m = tl.arange(0, BLOCK_ROWS)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    for work in range(tl.program_id(0), tiles * columns, tl.num_programs(0)):
        tile, block = _work_item(work, tiles, columns, GROUP)
        column = block * BLOCK_N + n
        slot = tl.load(tile_slot + tile).to(tl.int64)
        row = tl.load(tile_row + tile) + m
        kept = row < tl.load(row_end + slot)
        within = column < hidden
        act_row = tl.where(kept, row, 0).to(tl.int64)
        act_at = act + act_row[None, :] * intermediate + k[:, None]
        offset = tl.where(within, column, 0).to(tl.int64)[:, None] * intermediate + k[None, :]
        weight_at = weights + slot * hidden * intermediate + offset
        total = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
        for start in range(0, intermediate, BLOCK_K):
            if EVEN:
                act_tile = tl.load(act_at)
                weight_tile = tl.load(weight_at)
            else:
                inside = k < intermediate - start
                act_tile = tl.load(act_at, mask=inside[:, None], other=0.0)
                weight_tile = tl.load(weight_at, mask=inside[None, :], other=0.0)
            if UPCAST:
                act_tile = act_tile.to(tl.float32)
                weight_tile = weight_tile.to(tl.float32)
            total = _add_product(weight_tile, act_tile, total, PRECISION, FRESH)
            act_at += BLOCK_K
            weight_at += BLOCK_K
        if HAS_BIAS:
            bias_at = biases + slot * hidden + column
            total += tl.load(bias_at, mask=within, other=0.0).to(tl.float32)[:, None]
        y_at = y + row.to(tl.int64)[None, :] * stride_y + column[:, None]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=within[:, None] & kept[None, :])


@triton.jit
def reduce(
    y: tl.tensor,
    where: tl.tensor,
    gates: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    stride_y: tl.tensor,
    stride_out: tl.tensor,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """out[t] = sum over k of gates[t, k] * y[where[t, k]], float32, choice 0 first.

    A `where` outside [0, rows) adds nothing and is not read; each token is one program per column
    block.
    """
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < hidden
    total = tl.zeros([BLOCK_H], tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(where + t * K + choice).to(tl.int64)
        gate = tl.load(gates + t * K + choice)
        wide = tl.broadcast_to(row, BLOCK_H)
        kept = inside & (wide >= 0) & (wide < rows)
        value = tl.load(y + row * stride_y + h, mask=kept, other=0.0).to(tl.float32)
        total += tl.where(kept, gate * value, 0.0)
    tl.store(out + t * stride_out + h, total.to(out.dtype.element_ty), mask=inside)
