"""Layers in threads: how many, and in which order answers come."""

from __future__ import annotations

import os

import pytest

from loadmaster.foundation.parallel import LayerThreads, usable_cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system tells no affinity")
def test_jobs_that_share_a_machine_may_limit_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for limit, cores in (("1", 1), ("3", 3), ("64", 4), ("0", 1), ("", 4), ("many", 4)):
        monkeypatch.setenv("NUMBA_NUM_THREADS", limit)
        assert usable_cores() == cores, limit
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    assert usable_cores() == 4


@pytest.mark.parametrize("limit", ["1", ""])
def test_answers_come_in_the_order_of_the_items_whatever_yields_them(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", limit)
    items = (n for n in range(50))
    assert list(LayerThreads().map(lambda n: n * n, items)) == [n * n for n in range(50)]
