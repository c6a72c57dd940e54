"""advise_loads: several methods on average loads alone, with what loads can show of them.

Without steps nothing tells noise, times or replicas: plans are ranked by the imbalance of the loads
they were made for. Knows loads and plans. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...foundation.parallel import Executor
from ...traces.model_spec import ModelSpec
from ...traces.profile import Profile
from ..cluster import Cluster
from ..cost.evaluate import check_slots
from ..plan import DispatchSpec, Plan
from ..planning.planner import PlanResult
from .advise import CURRENT
from .rebalance import rebalance
from .switch_payback import Moving, price_moves
from .trial_plans import USUAL_METHODS, MethodProgress, attempt


@dataclass(frozen=True, eq=False)
class LoadAdvice:
    """The plan to use, and why. Plans are best first; the current one is judged like the rest."""

    verdict: str
    chosen: str
    results: dict[str, PlanResult]
    cannot: dict[str, str] = field(default_factory=dict)
    moving: dict[str, Moving] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The plan the verdict names."""
        return self.results[self.chosen].plan

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know besides the table."""
        fired = [n for n, result in self.results.items() if result.truncated and n != CURRENT]
        return (
            *(f"{name}: cannot ({why})" for name, why in self.cannot.items()),
            *([f"time limit fired: {', '.join(fired)} may improve with more time"] if fired
              else []),
            *self.results[self.chosen].evidence.notes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = []
        for name, result in self.results.items():
            row = {"name": name, "chosen": name == self.chosen, "seconds": result.seconds,
                   "truncated": result.truncated} | result.evidence.model_dump()
            moving = self.moving.get(name)
            row |= {} if moving is None else moving.to_dict()
            if result.moves:
                row["ordered_moves"] = [list(move) for move in result.moves]
            rows.append(row)
        return {"verdict": self.verdict, "chosen": self.chosen, "cannot": self.cannot,
                "rows": rows, "notes": list(self.notes)}


def advise_loads(
    profile: Profile,
    cluster: Cluster,
    *,
    methods: Sequence[str] = USUAL_METHODS,
    current: Plan | None = None,
    max_moves: int | None = None,
    max_bytes: int | None = None,
    dispatch: str | DispatchSpec = "balanced",
    model: ModelSpec | None = None,
    objective: str | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    progress: MethodProgress | None = None,
    **options: Any,
) -> LoadAdvice:
    """Plan by every method on average loads and rank by what the loads say; see `advise`.

    With `current`, that is a row too, and stays where nothing is flatter on these loads.
    """
    objective = objective or "balance"      # average loads have no steps to time
    asked: dict[str, Any] = {"dispatch": dispatch, "model": model, "objective": objective,
                             "seed": seed, **options}
    kept: dict[str, PlanResult] = {}
    if current is not None:
        check_slots(current, cluster, "the current plan")
        unhurried = asked | {"time_limit_s": None}      # no moves, so nothing is searched
        kept[CURRENT] = rebalance(current, profile, cluster, max_moves=0, **unhurried)
    tried = attempt(profile, cluster, methods, current, (max_moves, max_bytes),
                    executor=executor, progress=progress, **asked)
    results = kept | tried.results
    ranked = dict(sorted(results.items(), key=lambda found: found[1].evidence.objective))
    moving = {} if current is None else {
        name: price_moves(current, result.plan, cluster, model)
        for name, result in ranked.items() if name != CURRENT
    }
    best = next(iter(ranked))
    return LoadAdvice(_verdict(best, ranked, moving), best, ranked, tried.cannot, moving)


def _verdict(best: str, ranked: dict[str, PlanResult], moving: dict[str, Moving]) -> str:
    reached = ranked[best].evidence.objective
    claim = f"{best}: imbalance of the average loads {reached:.4f}"
    if best == CURRENT:
        claim = f"leave it: no plan is flatter than the current one, {claim[len(best) + 2:]}"
    elif CURRENT in ranked:
        claim += f", {ranked[CURRENT].evidence.objective:.4f} under the current plan"
        claim += f"; {moving[best]}"
    return f"{claim}; how single steps fare cannot be told from average loads"
