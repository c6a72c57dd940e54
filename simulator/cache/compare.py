"""Every cache policy, with every way of guessing ahead, over the same steps of one trace.

What is learnt is learnt from one half of the trace's requests, and all play the other half. Knows
traces, models and the device's rates. Knows nothing of plans or of several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, UsageError
from ...placement.cluster import Cluster
from ...placement.hardware import ComputeProfile
from ...placement.held_back import EVEN_SHARE
from ...traces.model_spec import ModelSpec
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from .expert_cache import CacheResult, CacheTier, play_cache
from .policies import POLICIES
from .predictors import ConditionalFrequency, LookAhead, Predictor

PREDICTORS = ("none", "conditional", "look_ahead")
BOUND = "belady"             # knows the future


@dataclass(frozen=True)
class CacheRow:
    """One policy and predictor; `figures` over the steps of all."""

    policy: str
    predictor: str
    figures: CacheResult

    @property
    def name(self) -> str:
        """As a table shows it."""
        bound = " (bound)" if self.policy == BOUND else ""
        ahead = "" if self.predictor == "none" else f" + {self.predictor}"
        return f"{self.policy}{ahead}{bound}"


@dataclass(frozen=True)
class CacheTable:
    """Rows by stall, least first, ties in the order of policies; what the loads take."""

    rows: tuple[CacheRow, ...]
    tier: CacheTier
    steps: int
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The best policy that could be had, and how far it is from the bound."""
        best = next((row for row in self.rows if row.policy != BOUND), self.rows[0])
        text = (
            f"{best.name}: {100 * best.figures.hit_rate:.1f} % hits, stalls "
            f"{best.figures.stall_us / best.figures.steps / 1e3:.3f} ms a step"
        )
        bound = next((row for row in self.rows if row.policy == BOUND), None)
        if bound is None or bound is best:
            return text
        return (
            f"{text}; without guessing ahead no policy hits more than "
            f"{100 * bound.figures.hit_rate:.1f} %"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "verdict": self.verdict, "slots": self.tier.slots, "shared": self.tier.shared,
            "load_us": self.tier.load_us, "steps": self.steps,
            "rows": [
                {"predictor": row.predictor} | row.figures.to_dict() for row in self.rows
            ],
            "notes": list(self.notes),
        }


def compare_caches(
    trace: RoutingTrace,
    tier: CacheTier,
    model: ModelSpec,
    cluster: Cluster,
    *,
    policies: Sequence[str] = POLICIES,
    predictors: Sequence[str] = PREDICTORS,
    accuracy: float = 0.9,
    steps: StepSampler = StepSampler(tokens=1, concurrency=1),  # noqa: B008  (frozen)
    max_steps: int | None = 200,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> CacheTable:
    """Play every policy with every predictor, Belady's with none; `progress()` after each.

    accuracy: of the look-ahead, a premise (traces hold no gate inputs). Raises UsageError on an
    unknown name, InputError on a trace that is not the model's or too short.
    """
    _require_known("cache policy", policies, POLICIES)
    _require_known("cache predictor", predictors, PREDICTORS)
    if (model.num_layers, model.num_experts) != (trace.num_layers, trace.num_experts):
        raise InputError(
            f"model: {model.num_layers} layers of {model.num_experts} experts, the trace has "
            f"{trace.num_layers} of {trace.num_experts}: they are of different models"
        )
    known, played = trace.split(EVEN_SHARE, seed=seed)
    cut = steps.sample(played, max_steps)
    expert_us, token_us = _compute_us(model, cluster.hardware.compute)
    rows = []
    for guess in dict.fromkeys(predictors):
        predictor = _predictor(guess, known, played, accuracy, seed)
        for policy in dict.fromkeys(policies):
            if policy == BOUND and guess != "none":
                continue         # with guesses it bounds nothing
            rows.append(CacheRow(policy, guess, play_cache(
                played, cut, tier, policy=policy, predictor=predictor, expert_us=expert_us,
                token_us=token_us,
            )))
            if progress is not None:
                progress()
    rows.sort(key=lambda row: row.figures.stall_us)
    if not rows:
        raise UsageError(f"{BOUND} bounds what is possible without guessing: ask for none, too")
    notes = (*_notes(policies, predictors, accuracy), *cut.notes)
    return CacheTable(tuple(rows), tier, len(cut), notes)


def _require_known(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in asked if name not in known]:
        raise UsageError(f"unknown {what} {unknown[0]!r}; there are: {', '.join(known)}")


def _compute_us(model: ModelSpec, profile: ComputeProfile) -> tuple[float, float]:
    """(microseconds of an active expert, of each of its tokens); a table as the line it makes."""
    tokens, us = profile.expert_table_tokens, profile.expert_table_us
    if len(tokens) > 1:
        token_us = max(0.0, (us[-1] - us[0]) / (tokens[-1] - tokens[0]))
        return max(0.0, us[0] - tokens[0] * token_us), token_us
    read_us = float(model.bytes_per_expert_E().mean()) / profile.hbm_bytes_per_s * 1e6
    token_us = model.flops_per_assignment / profile.flops_per_s * 1e6
    return profile.active_expert_us + read_us, token_us


def _predictor(
    name: str, known: RoutingTrace, played: RoutingTrace, accuracy: float, seed: int
) -> Predictor | None:
    if name == "conditional":
        return ConditionalFrequency(known, played)
    if name == "look_ahead":
        return LookAhead.with_accuracy(played, accuracy, seed=seed)
    return None


def _notes(policies: Sequence[str], predictors: Sequence[str], accuracy: float) -> list[str]:
    notes = []
    if BOUND in policies:
        notes.append("belady knows the future: a bound on hits without guessing, not a policy")
    if "conditional" in predictors:
        notes.append("conditional: learnt on half of the requests, all are played on the others")
    if "look_ahead" in predictors:
        notes.append(f"look_ahead: guesses right with probability {accuracy:g}, a premise")
    return notes
