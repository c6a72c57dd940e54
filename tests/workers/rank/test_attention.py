"""Attention of a packed step: each request gets what it would get alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from loadmaster.workers.rank.attention import PackedStep, RequestCache, packed_attention, running

HEADS, KV_HEADS, WIDTH = 4, 2, 16


def module(**extra: object) -> SimpleNamespace:
    return SimpleNamespace(
        layer_idx=0, is_causal=True, training=False, num_key_value_groups=HEADS // KV_HEADS, **extra
    )


def rows(total: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, heads, total, WIDTH, generator=draw).bfloat16()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def attend(
    lengths: list[int],
    caches: list[RequestCache],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **options: object,
) -> torch.Tensor:
    step = PackedStep(lengths, caches)
    with running(step):
        out, _ = packed_attention(module(), query, key, value, None, scaling=0.25, **options)  # type: ignore[arg-type]
    step.finish()
    return out


def oracle(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Softmax attention of one whole sequence in float64, position by position. [T, h, D]"""
    q, k, v = (x[0].double() for x in (query, key, value))
    total = q.shape[1]
    out = torch.zeros(total, HEADS, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        for t in range(total):
            first = 0 if window is None else max(0, t - window + 1)
            weights = torch.softmax(k[kv, first : t + 1] @ q[head, t] * 0.25, dim=0)
            out[t, head] = weights @ v[kv, first : t + 1]
    return out


@pytest.mark.parametrize("window", [None, 5])
def test_one_request_gets_causal_attention(window: int | None) -> None:
    q, k, v = rows(23)
    out = attend([23], [RequestCache()], q, k, v, sliding_window=window)
    assert torch.allclose(out[0].double(), oracle(q, k, v, window), atol=2e-2)


def test_neighbours_do_not_change_a_bit() -> None:
    parts = [rows(n, seed=n) for n in (9, 1, 30)]
    alone = [attend([p[0].shape[2]], [RequestCache()], *p) for p in parts]
    packed = [torch.cat([p[i] for p in parts], dim=2) for i in range(3)]
    together = attend([9, 1, 30], [RequestCache() for _ in range(3)], *packed)
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("window", [None, 7])
def test_chunks_and_single_tokens_continue_the_sequence(window: int | None) -> None:
    q, k, v = rows(140)
    cache, outs, start = RequestCache(), [], 0
    for length in (64, 70, 1, 1, 4):
        part = slice(start, start + length)
        outs.append(
            attend([length], [cache], q[:, :, part], k[:, :, part], v[:, :, part],
                   sliding_window=window)
        )
        start += length
    assert cache.length == 140
    assert torch.allclose(
        torch.cat(outs, dim=1)[0].double(), oracle(q, k, v, window), atol=2e-2
    )


def test_padding_rows_are_zero_and_leave_no_trace() -> None:
    q, k, v = rows(16)
    cache = RequestCache()
    out = attend([3], [cache], q, k, v)
    assert cache.length == 3
    assert not out[0, 3:].any()
    assert out[0, :3].any()


def test_a_step_that_did_not_finish_can_be_run_again() -> None:
    """A peer died after this rank's first layers: the rows were appended but do not count."""
    q, k, v = rows(8)
    cache = RequestCache()
    with running(PackedStep([8], [cache])):
        packed_attention(module(), q, k, v, None, scaling=0.25)
    assert cache.length == 0
    again = attend([8], [cache], q, k, v)
    assert torch.equal(again, attend([8], [RequestCache()], q, k, v))
