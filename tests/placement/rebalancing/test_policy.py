"""When to look for a better plan and when to switch: every decision, as a table."""

from __future__ import annotations

import pytest

from loadmaster.errors import UsageError
from loadmaster.placement.rebalancing.policy import MOST_DOUBLINGS, Observation, Policy

NEVER = Policy("never")
EVERY = Policy("every_n", every_steps=100, fewest_tokens=50)
DRIFT = Policy("drift", every_steps=100, fewest_tokens=50, drift_factor=2.0, drift_margin_bits=0.01)
NET = Policy("net_benefit", every_steps=100, fewest_tokens=50, horizon_steps=1000, safety=1.0)


def boundary(
    step: int = 100, *, last: int = 0, tokens: int = 50, drift: float | None = None,
    floor: float = 0.0, rollbacks: int = 0,
) -> Observation:
    """A step boundary without a candidate."""
    return Observation(
        step=step, last_look_step=last, tokens_since_switch=tokens, drift_bits=drift,
        drift_floor_bits=floor, rollbacks=rollbacks,
    )


def candidate(
    gain: float, *, low: float | None = None, move: float = 0.0, moves: int = 3
) -> Observation:
    """A step boundary with a candidate at hand."""
    return Observation(step=100, gain_us=gain, gain_low_us=low, move_us=move, moves=moves)


@pytest.mark.parametrize(("policy", "seen", "action", "reason"), [
    (NEVER, boundary(10_000, tokens=10**9, drift=1.0), "keep", "never"),
    (EVERY, boundary(99), "keep", "99 of 100 steps"),
    (EVERY, boundary(100), "look", "100 steps since"),
    (EVERY, boundary(150, last=100), "keep", "50 of 100 steps"),
    (EVERY, boundary(200, last=100), "look", "100 steps since"),
    (EVERY, boundary(100, tokens=49), "keep", "not enough data: 49 tokens"),
    (DRIFT, boundary(100), "keep", "not measured"),
    (DRIFT, boundary(100, drift=0.05, floor=0.02), "keep", "within 0.0500"),
    (DRIFT, boundary(100, drift=0.0501, floor=0.02), "look", "above 0.0500"),
    (DRIFT, boundary(99, drift=1.0), "keep", "99 of 100 steps"),
    (DRIFT, boundary(100, drift=1.0, tokens=0), "keep", "not enough data"),
    (NET, boundary(100), "look", "100 steps since"),
    (NET, boundary(199, rollbacks=1), "keep", "199 of 200 steps since the last look after 1"),
    (NET, boundary(200, rollbacks=1), "look", "200 steps since"),
    (NET, boundary(399, rollbacks=2), "keep", "of 400 steps"),
    (NET, boundary(400, rollbacks=2), "look", "400 steps since"),
])
def test_whether_to_look(policy: Policy, seen: Observation, action: str, reason: str) -> None:
    decision = policy.decide(seen)
    assert decision.action == action
    assert reason in decision.reason


@pytest.mark.parametrize(("policy", "seen", "action", "reason"), [
    (NEVER, candidate(1e9), "keep", "never"),
    (EVERY, candidate(5.0, moves=0), "keep", "active"),
    (EVERY, candidate(0.0), "keep", "no gain"),
    (EVERY, candidate(-1.0), "keep", "no gain"),
    (EVERY, candidate(0.1, low=-5.0, move=1e9), "switch", "gain 0.1 us"),
    (DRIFT, candidate(0.1, move=1e9), "switch", "gain 0.1 us"),
    (DRIFT, candidate(-0.1), "keep", "no gain"),
    (NET, candidate(5.0, moves=0), "keep", "active"),
    (NET, candidate(5.0, low=0.0), "keep", "within the noise"),
    (NET, candidate(5.0, low=-1.0), "keep", "within the noise"),
    (NET, candidate(5.0, low=2.0, move=2000.0), "switch", "after 1000 steps"),
    (NET, candidate(5.0, low=2.0, move=2002.0), "keep", "after 1001 steps, the horizon"),
    (NET, candidate(5.0, move=5000.0), "switch", "after 1000 steps"),    # no band: the gain itself
    (NET, candidate(5.0, low=2.0), "switch", "after 0 steps"),           # a free move
])
def test_whether_to_switch(policy: Policy, seen: Observation, action: str, reason: str) -> None:
    decision = policy.decide(seen)
    assert decision.action == action
    assert reason in decision.reason


def test_safety_asks_for_a_multiple_of_the_cost() -> None:
    cautious = Policy("net_benefit", horizon_steps=1000, safety=2.0)
    assert cautious.decide(candidate(5.0, low=2.0, move=1000.0)).action == "switch"
    assert cautious.decide(candidate(5.0, low=2.0, move=1001.0)).action == "keep"


def test_backing_off_has_an_end() -> None:
    longest = 100 * 2**MOST_DOUBLINGS
    assert NET.decide(boundary(longest - 1, rollbacks=50)).action == "keep"
    assert NET.decide(boundary(longest, rollbacks=50)).action == "look"


def test_a_policy_keeps_nothing_between_calls() -> None:
    first = NET.decide(boundary(100))
    NET.decide(candidate(5.0, low=2.0))
    assert NET.decide(boundary(100)) == first


@pytest.mark.parametrize("numbers", [
    {"name": "sometimes"}, {"every_steps": 0}, {"horizon_steps": 0.0}, {"safety": -1.0},
])
def test_policies_that_mean_nothing_are_refused(numbers: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Policy(**numbers)  # type: ignore[arg-type]
