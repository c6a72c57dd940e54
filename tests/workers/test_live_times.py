"""What a switch costs: guessed before the first one, learned from every one after it."""

from __future__ import annotations

import pytest

from loadmaster.workers.live_times import MovePrice


def test_before_any_switch_small_experts_are_not_thought_free() -> None:
    """Messages, hashes and rounds take their time however few the bytes."""
    assert MovePrice().us(20, 20 * 36_000.0) > 20_000
    assert MovePrice().us(0, 0.0) == 0.0


def test_large_experts_cost_by_their_bytes() -> None:
    assert MovePrice().us(1, 1e9) == pytest.approx(1e6, rel=0.01)


def test_a_switch_felt_is_what_the_like_of_it_will_cost() -> None:
    price = MovePrice().learned(20, 7e5, felt_us=90_000.0)
    assert price.us(20, 7e5) == pytest.approx(90_000.0)
    assert price.us(10, 3.5e5) == pytest.approx(45_000.0)
    again = price.learned(4, 1.4e5, felt_us=4_000.0)
    assert again.us(4, 1.4e5) == pytest.approx(4_000.0), "the last one counts, not a product"


def test_a_switch_nobody_felt_teaches_nothing() -> None:
    price = MovePrice(2.0)
    assert price.learned(20, 7e5, felt_us=0.0) == price
    assert price.learned(0, 0.0, felt_us=500.0) == price
