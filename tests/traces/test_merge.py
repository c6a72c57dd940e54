"""Traces of ranks and of recordings put together."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.traces.merge import concatenate, in_step_order


def test_halves_make_the_whole(make_trace: Any) -> None:
    """Cutting and joining is the identity."""
    trace = make_trace()
    parts = [trace.select(np.arange(0, 90)), trace.select(np.arange(90, 90)),
             trace.select(np.arange(90, 200))]
    assert concatenate(parts).digest() == trace.digest()


def test_domains_are_joined_by_name(make_trace: Any) -> None:
    """The same index under two names is two domains."""
    first = make_trace(tokens=4)
    second = dataclasses.replace(first, domain_names=("code", "math"))
    joined: Any = concatenate([first, second])
    assert joined.domain_names == ("chat", "code", "math")
    names = [joined.domain_names[d] for d in joined.domain]
    assert names == [("chat", "code")[d] for d in first.domain] + [
        ("code", "math")[d] for d in first.domain
    ]


def test_only_columns_that_all_have_are_kept(make_trace: Any) -> None:
    first = make_trace()
    joined: Any = concatenate([first, dataclasses.replace(first, gates=None, domain=None)])
    assert joined.gates is None and joined.domain is None and joined.domain_names == ()
    assert len(joined.step) == 400


def test_different_models_do_not_go_together(make_trace: Any) -> None:
    with pytest.raises(InputError, match="one trace holds one model"):
        concatenate([make_trace(), make_trace(experts=9)])
    with pytest.raises(InputError, match="at least one"):
        concatenate([])


def test_step_order_keeps_the_order_inside_a_step(make_trace: Any) -> None:
    trace = make_trace(tokens=32)
    shuffled = trace.select(np.random.default_rng(0).permutation(32))
    ordered: Any = in_step_order(shuffled)
    assert np.array_equal(ordered.step, np.sort(trace.step))
    assert np.array_equal(ordered.ids[:16], shuffled.select(shuffled.step == 0).ids)
