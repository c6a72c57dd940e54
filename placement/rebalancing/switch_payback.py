"""What it takes to come from the active plan to another, and whether that pays.

Knows plans, links and gains per step. Knows nothing of how plans were found; the decision is
`policy.py`'s, the same as in simulation and in live control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...traces.model_spec import ModelSpec
from ..cluster import Cluster
from ..cost.step_cost import move_cost
from ..plan import Plan
from .policy import Observation, Policy

HORIZON_STEPS = Policy().horizon_steps


@dataclass(frozen=True)
class Moving:
    """Experts to send. Bytes and transfer time are None without sizes, gains without times.

    significant_gain_us: per step, at the low end of its band where there is one.
    """

    moves: int
    share: float                       # of the target's filled slots
    bytes: int | None = None
    us: float | None = None
    gain_us: float | None = None
    significant_gain_us: float | None = None

    @property
    def pays_back_after_steps(self) -> float | None:
        """Transfer time over the significant gain per step; None where unknown, or no gain."""
        if self.us is None or self.significant_gain_us is None or self.significant_gain_us <= 0:
            return None
        return self.us / self.significant_gain_us

    def refusal(self, horizon_steps: float) -> str | None:
        """Why these moves do not pay within the horizon; None where they do, or none can tell."""
        if not self.moves or self.us is None or self.gain_us is None:
            return None
        decision = Policy(horizon_steps=horizon_steps).decide(Observation(
            step=0, gain_us=self.gain_us, gain_low_us=self.significant_gain_us, move_us=self.us,
            moves=self.moves,
        ))
        return None if decision.action == "switch" else decision.reason

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "moves": self.moves, "move_share": self.share, "move_bytes": self.bytes,
            "move_us": self.us, "gain_us": self.gain_us,
            "pays_back_after_steps": self.pays_back_after_steps,
        }

    def __str__(self) -> str:
        if not self.moves:
            return "no expert moves"
        size = "" if self.bytes is None else f", {self.bytes / 1e9:,.2f} GB"
        text = (
            f"{self.moves:,} expert{' moves' if self.moves == 1 else 's move'} "
            f"({self.share:.1%} of slots{size})"
        )
        if self.bytes is None:
            return f"{text}; what that costs is not known without the experts' sizes (--model)"
        steps = self.pays_back_after_steps
        return text if steps is None else f"{text}, paid back after {steps:,.0f} steps"


def price_moves(
    current: Plan,
    target: Plan,
    cluster: Cluster,
    model: ModelSpec | None,
    gain_us: float | None = None,
    significant_gain_us: float | None = None,
) -> Moving:
    """What coming from `current` to `target` takes, against a gain per step."""
    moves = current.moves_to(target)
    share = len(moves) / int((target.slots >= 0).sum())
    if model is None or not model.knows_bytes:
        return Moving(len(moves), share)
    cost = move_cost(moves, current, model, cluster)
    low_us = gain_us if significant_gain_us is None else significant_gain_us
    return Moving(len(moves), share, cost.bytes, cost.us, gain_us, low_us)
