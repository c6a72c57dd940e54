"""Triton kernels that send assignments to rows.

    route         top-k and gates, or given ids; counts per token block and running load
    scan_blocks   where each block's rows of an expert begin among that expert's rows
    scan          rows of each segment, offsets, and the map of tiles
    place         the row of every assignment: experts in order, tokens in order inside

Knows pointers, strides and block sizes only; `triton_routing.py` allocates and launches.

Segments: a segment is the part of an expert's rows that one slot computes. Segments are ordered
by (expert, slot) and rows by (expert, token), so cutting an expert's rows in that order is
exactly "assignments in token order fill the slots in ascending order". No slot is ever stored
per assignment. Only integers are added atomically. Left-out assignments (ids outside [0, E)) are
never counted or placed.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sort_key(x: tl.tensor) -> tl.tensor:
    """An int32 that orders as the float does; -0 equals +0 and every number exceeds the least."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _known(expert: tl.tensor, experts: tl.tensor) -> tl.tensor:
    """Ids of any width as int32, what lies outside [0, E) as -1: compared before it is narrowed."""
    wide = expert.to(tl.int64)
    return tl.where((wide >= 0) & (wide < experts), wide, -1).to(tl.int32)


@triton.jit
def route(
    logits: tl.tensor,
    ids: tl.tensor,
    gates: tl.tensor,
    block_counts: tl.tensor,
    load: tl.tensor,
    recording: tl.tensor,
    tokens: tl.tensor,
    experts: tl.tensor,
    stride_logits: tl.tensor,
    K: tl.constexpr,
    KP: tl.constexpr,
    EP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RECORD: tl.constexpr,
) -> None:
    """One block of tokens: choose experts (or read the ids given), count them.

    Writes ids [T, K] and gates [T, K] when FROM_LOGITS, block_counts [blocks, EP] always. With
    RECORD and a set flag, adds the counts to load [E] int64: integers, so order cannot matter.
    """
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, EP)
    k = tl.arange(0, KP)
    live = t < tokens
    counts = tl.zeros([EP], tl.int32)
    if FROM_LOGITS:
        inside = live[:, None] & (e < experts)[None, :]
        at = t.to(tl.int64)[:, None] * stride_logits + e[None, :]
        row = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        left = tl.where(inside, _sort_key(row), -2147483648)
        poisoned = tl.max((row != row).to(tl.int32), 1) > 0
        chosen = tl.zeros([BLOCK_T, KP], tl.float32)
        highest = tl.zeros([BLOCK_T], tl.float32)
    for choice in tl.static_range(K):
        slot = t.to(tl.int64) * K + choice
        if FROM_LOGITS:
            best = tl.argmax(left, 1, tie_break_left=True)
            picked = e[None, :] == best[:, None]
            value = tl.sum(tl.where(picked, row, 0.0), 1)
            left = tl.where(picked, -2147483648, left)
            if choice == 0:
                highest = value
            chosen = tl.where((k == choice)[None, :], tl.exp(value - highest)[:, None], chosen)
            tl.store(ids + slot, best.to(ids.dtype.element_ty), mask=live)
        else:
            best = _known(tl.load(ids + slot, mask=live, other=0), experts)
            picked = e[None, :] == best[:, None]
        real = picked & live[:, None] & (e < experts)[None, :]
        counts += tl.sum(real.to(tl.int32), 0)
    if FROM_LOGITS:
        if NORMALIZE:
            total = tl.sum(chosen, 1)
        else:
            total = tl.sum(tl.where(inside, tl.exp(row - highest[:, None]), 0.0), 1)
        gate = chosen / tl.where(live, total, 1.0)[:, None]
        gate = tl.where(poisoned[:, None], float("nan"), gate)
        at = t.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(gates + at, gate, mask=live[:, None] & (k < K)[None, :])
    tl.store(block_counts + block.to(tl.int64) * EP + e, counts)
    if RECORD:  # noqa: SIM102 - one is known when compiling, the other only on the device
        if tl.load(recording) != 0:
            tl.atomic_add(load + e, counts.to(tl.int64), mask=(e < experts) & (counts > 0))


@triton.jit
def scan_blocks(
    block_counts: tl.tensor,
    totals: tl.tensor,
    blocks: tl.tensor,
    EP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Turn the counts of every block, in place, into the counts of the blocks before it."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    carry = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        at = b.to(tl.int64)[:, None] * EP + e[None, :]
        inside = (b < blocks)[:, None] & (e < EP)[None, :]
        count = tl.load(block_counts + at, mask=inside, other=0)
        before = tl.cumsum(count, 0) - count + carry[None, :]
        tl.store(block_counts + at, before, mask=inside)
        carry += tl.sum(count, 0)
    tl.store(totals + e, carry, mask=e < EP)


@triton.jit
def scan(
    totals: tl.tensor,
    quotas: tl.tensor,
    segment_expert: tl.tensor,
    segment_first: tl.tensor,
    segment_slot: tl.tensor,
    expert_start: tl.tensor,
    row_end: tl.tensor,
    tile_segment: tl.tensor,
    tile_row: tl.tensor,
    tile_count: tl.tensor,
    load: tl.tensor,
    recording: tl.tensor,
    segments: tl.tensor,
    row_limit: tl.tensor,
    EP: tl.constexpr,
    SP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    HAS_QUOTAS: tl.constexpr,
    RECORD: tl.constexpr,
) -> None:
    """Rows of every segment and the tiles that cover them; each program maps its own tiles.

    Without quotas segment i is expert i, all of it. With quotas a segment takes its quota, never
    more than is left, and an expert's last segment takes the rest: no row is lost or computed by
    another expert even where quotas do not add up. Rows end at row_limit whatever totals and
    quotas say: both are capped before they are summed, and the sums are 64 bits wide.
    Writes expert_start [EP], row_end [segments], and with RECORD adds the rows each slot computed
    to load [slots] int64.
    """
    e = tl.arange(0, EP)
    p = tl.arange(0, SP)
    total = tl.minimum(tl.maximum(tl.load(totals + e), 0), row_limit)
    start_e = tl.minimum(tl.cumsum(total.to(tl.int64), 0) - total, row_limit).to(tl.int32)
    real = p < segments
    if HAS_QUOTAS:
        expert = tl.load(segment_expert + p, mask=real, other=0)
        first = tl.load(segment_first + p, mask=real, other=0)
        held = tl.gather(total, expert, 0)
        quota = tl.load(quotas + p, mask=real, other=0)
        quota = tl.minimum(tl.maximum(quota, 0), held)
        before_all = tl.cumsum(quota.to(tl.int64), 0) - quota
        before = before_all - tl.gather(before_all, first, 0)
        before = tl.minimum(before, held).to(tl.int32)
        # The first segment of the next expert is not one of this expert's.
        following = tl.load(segment_first + p + 1, mask=p + 1 < segments, other=-1)
        is_last = following != first
        rows = tl.where(is_last, held - before, tl.minimum(quota, held - before))
        rows = tl.where(real, rows, 0)
        start = tl.minimum(tl.gather(start_e, expert, 0), row_limit - before) + before
    else:
        expert = p
        rows = tl.where(real, tl.gather(total, tl.minimum(p, EP - 1), 0), 0)
        start = tl.gather(start_e, tl.minimum(p, EP - 1), 0)
    rows = tl.maximum(tl.minimum(rows, row_limit - start), 0)
    tiles = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    tile_end = tl.cumsum(tiles, 0)
    i = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    segment = tl.sum((i[:, None] >= tile_end[None, :]).to(tl.int32), 1)
    mine = p[None, :] == segment[:, None]
    row = tl.sum(tl.where(mine, (start - (tile_end - tiles) * BLOCK_ROWS)[None, :], 0), 1)
    mapped = i < tl.sum(tiles, 0)
    tl.store(tile_segment + i, segment, mask=mapped)
    tl.store(tile_row + i, row + i * BLOCK_ROWS, mask=mapped)
    if tl.program_id(0) == 0:
        tl.store(expert_start + e, start_e)
        tl.store(row_end + p, start + rows, mask=real)
        tl.store(tile_count, tl.sum(tiles, 0))
        if RECORD:  # noqa: SIM102 - as above
            if tl.load(recording) != 0:
                slot = tl.load(segment_slot + p, mask=real, other=0)
                tl.atomic_add(load + slot, rows.to(tl.int64), mask=real & (rows > 0))


@triton.jit
def place(
    ids: tl.tensor,
    block_counts: tl.tensor,
    expert_start: tl.tensor,
    source: tl.tensor,
    where: tl.tensor,
    tokens: tl.tensor,
    experts: tl.tensor,
    K: tl.constexpr,
    EP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
) -> None:
    """Give every assignment its row: equals a stable sort by expert, with no sorting.

    source [A]: assignment t * K + k of each row. where [T, K]: that same index, or -1 where the
    assignment is left out (so `reduce` reads it alone).
    """
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, EP)
    live = (t < tokens)[:, None] & (e < experts)[None, :]
    mine = tl.zeros([BLOCK_T, EP], tl.int32)
    for choice in tl.static_range(K):
        at = t.to(tl.int64) * K + choice
        expert = _known(tl.load(ids + at, mask=t < tokens, other=0), experts)
        mine += ((e[None, :] == expert[:, None]) & live).to(tl.int32)
    begin = tl.load(expert_start + e)
    if not ONE_BLOCK:
        begin += tl.load(block_counts + block.to(tl.int64) * EP + e)
    # The next free row of every expert, as token t finds it.
    free = tl.cumsum(mine, 0) - mine + begin[None, :]
    for choice in tl.static_range(K):
        at = t.to(tl.int64) * K + choice
        expert = _known(tl.load(ids + at, mask=t < tokens, other=0), experts)
        picked = (e[None, :] == expert[:, None]) & live
        row = tl.sum(tl.where(picked, free, 0), 1)
        kept = tl.sum(picked.to(tl.int32), 1) > 0
        tl.store(source + row, at.to(tl.int32), mask=kept)
        tl.store(where + at, tl.where(kept, at, -1).to(tl.int32), mask=t < tokens)
        free += picked.to(tl.int32)
