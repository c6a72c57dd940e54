"""When to re-plan and when to switch: pure decisions, the same in simulation and in live control.

A policy reads an `Observation` and answers with a `Decision`; it keeps nothing between calls, so a
run can be replayed. Knows counts, drift and predicted gains. Knows nothing of clocks, plans'
contents or who acts on the answer.

never         keep the plan.
every_n       look for a better plan every n steps.
drift         look when today's loads are farther from those planned for than noise explains.
net_benefit   look every n steps; switch only if the gain, at the low end of its band, pays for the
              move within a horizon. After a switch that measured worse than promised it backs off,
              twice as long each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import UsageError

Action = Literal["keep", "look", "switch"]


@dataclass(frozen=True)
class Observation:
    """What is known at a step boundary.

    Before a candidate plan exists only the first group is filled; `decide` then answers keep or
    look. With a candidate the second group is filled; it answers keep or switch.
    """

    step: int                              # steps served so far
    last_look_step: int = 0                # when a candidate was last sought
    tokens_since_switch: int = 0           # recorded under the active plan
    drift_bits: float | None = None        # Jensen-Shannon divergence to the loads planned for
    drift_floor_bits: float = 0.0          # the same between halves of one sample: noise
    rollbacks: int = 0                     # switches in a row that measured worse than promised

    gain_us: float | None = None           # predicted per step, against the active plan
    gain_low_us: float | None = None       # low end of its band
    move_us: float = 0.0                   # cost of switching that serving feels
    moves: int = 0                         # experts to send


@dataclass(frozen=True)
class Decision:
    """What to do, and why in one sentence."""

    action: Action
    reason: str
    enough_data: bool = True       # False: it is kept only because too little is known


@dataclass(frozen=True)
class Policy:
    """A policy by name and its numbers; see the module's head for what each does."""

    name: Literal["never", "every_n", "drift", "net_benefit"] = "net_benefit"
    every_steps: int = 1000                # between looks
    fewest_tokens: int = 2000              # recorded before any look: less says nothing
    drift_factor: float = 2.0              # look when drift > factor · floor + margin
    drift_margin_bits: float = 0.01
    horizon_steps: float = 10_000          # a switch must pay for itself within
    safety: float = 1.0                    # times the cost of moving that the gain must reach

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise UsageError(f"unknown policy {self.name!r}; there are: {', '.join(POLICIES)}")
        if self.every_steps < 1 or self.horizon_steps <= 0 or self.safety < 0:
            raise UsageError("a policy needs every_steps >= 1, horizon_steps > 0 and safety >= 0")

    def decide(self, seen: Observation) -> Decision:
        """Keep, look for a candidate, or switch to the one at hand."""
        if self.name == "never":
            return Decision("keep", "policy never: the plan stays")
        if seen.gain_us is None:
            return self._whether_to_look(seen)
        return self._whether_to_switch(seen)

    def _whether_to_look(self, seen: Observation) -> Decision:
        if seen.tokens_since_switch < self.fewest_tokens:
            return Decision(
                "keep",
                f"not enough data: {seen.tokens_since_switch} tokens since the last switch, "
                f"{self.fewest_tokens} are needed",
                enough_data=False,
            )
        wait = self.every_steps * 2 ** min(seen.rollbacks, MOST_DOUBLINGS)
        passed = seen.step - seen.last_look_step
        if passed < wait:
            back_off = f" after {seen.rollbacks} rollbacks" if seen.rollbacks else ""
            return Decision("keep", f"{passed} of {wait} steps since the last look{back_off}")
        if self.name != "drift":
            return Decision("look", f"{passed} steps since the last look")
        if seen.drift_bits is None:
            return Decision("keep", "drift is not measured yet")
        limit = self.drift_factor * seen.drift_floor_bits + self.drift_margin_bits
        if seen.drift_bits <= limit:
            return Decision("keep", f"drift {seen.drift_bits:.4f} bits is within {limit:.4f}")
        return Decision("look", f"drift {seen.drift_bits:.4f} bits is above {limit:.4f}")

    def _whether_to_switch(self, seen: Observation) -> Decision:
        assert seen.gain_us is not None
        if seen.moves == 0:
            return Decision("keep", "the best plan found is the active one")
        if self.name != "net_benefit":
            if seen.gain_us <= 0:
                return Decision("keep", f"no gain: {seen.gain_us:.1f} us a step")
            return Decision("switch", f"gain {seen.gain_us:.1f} us a step")
        low_us = seen.gain_us if seen.gain_low_us is None else seen.gain_low_us
        if low_us <= 0:
            return Decision(
                "keep", f"gain {seen.gain_us:.1f} us a step is within the noise (low {low_us:.1f})"
            )
        pays_after = self.safety * seen.move_us / low_us
        if pays_after > self.horizon_steps:
            return Decision(
                "keep",
                f"moving {seen.moves} experts pays back after {pays_after:.0f} steps, the horizon "
                f"is {self.horizon_steps:.0f}",
            )
        return Decision(
            "switch",
            f"gain {low_us:.1f} us a step at least; pays back after {pays_after:.0f} steps",
        )


POLICIES = ("never", "every_n", "drift", "net_benefit")
MOST_DOUBLINGS = 6     # of the wait between looks
