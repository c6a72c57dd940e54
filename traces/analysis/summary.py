"""What a trace holds, and whether it is long enough: the answer of `loadmaster trace info`.

Knows traces, profiles and imports. Knows nothing of plans: what a plan from n tokens is worth is
handed in as a judge (learning_curve.py). Prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ..formats import ImportResult, import_any
from ..profile import Profile
from ..steps import StepSampler
from ..trace import PHASES, RoutingTrace
from .drift import split_half_floor
from .learning_curve import Judge, LearningCurve, learning_curve


@dataclass(frozen=True)
class TraceInfo:
    """Facts of a trace or a load-only profile; what was not recorded is None."""

    format: str
    model_name: str
    tokens: int
    layers: int
    experts: int
    top_k: int
    layer_indices: tuple[int, ...]
    tokens_by_phase: dict[str, int] | None
    tokens_by_domain: dict[str, int] | None   # domains that occur, most tokens first
    requests: int | None
    source_ranks: int | None
    recorded_steps: int | None
    steps_available: int                      # whole steps under the sampler asked about
    skew_L: tuple[float, ...]                 # hottest expert / mean expert, per layer
    floor_bits: float | None                  # split-half noise floor of the loads
    curve: LearningCurve | None
    cannot_tell: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One sentence: is it long enough?"""
        if self.curve is not None:
            return self.curve.verdict
        return "whether it is long enough cannot be said: " + (
            self.notes[-1] if self.notes else "it holds loads only"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: every field, the verdict, and the curve as points."""
        out = {k: v for k, v in vars(self).items() if k != "curve"}
        out["layer_indices"], out["skew_L"] = list(self.layer_indices), list(self.skew_L)
        out["cannot_tell"], out["notes"] = list(self.cannot_tell), list(self.notes)
        out["skew"] = dict(
            zip(("min", "median", "max"), map(float, np.quantile(self.skew_L, (0, 0.5, 1))),
                strict=True)
        )
        out["verdict"] = self.verdict
        if self.curve is not None:
            out["learning_curve"] = {
                "points": [
                    {"tokens": n, "imbalance": i, "spread": s}
                    for n, i, s in zip(
                        self.curve.tokens, self.curve.imbalance, self.curve.spread, strict=True
                    )
                ],
                "held_out_tokens": self.curve.held_out_tokens,
                "needed_tokens": self.curve.needed_tokens,
                "long_enough": self.curve.long_enough,
                "tolerance": self.curve.tolerance,
                "judged_by": self.curve.judged_by,
            }
        return out


def trace_info(
    source: Path | str | RoutingTrace | Profile | ImportResult, *,
    steps: StepSampler | None = None, judge: Judge | None = None, devices: int = 8, seed: int = 0,
) -> TraceInfo:
    """What a path, trace, profile or import holds.

    steps: the sampler whose steps are counted. judge, devices: see `learning_curve`.
    Raises InputError where a path cannot be read.
    """
    if isinstance(source, (str, Path)):
        source = import_any(source)
    elif isinstance(source, RoutingTrace):
        source = ImportResult(format="trace", trace=source)
    elif isinstance(source, Profile):
        source = ImportResult(format="profile", profile=source)
    if source.trace is None:
        return _of_loads(source)
    return _of_trace(source, source.trace, steps or StepSampler(), (judge, devices, seed))


def _of_trace(
    source: ImportResult, trace: RoutingTrace, steps: StepSampler,
    curve_options: tuple[Judge | None, int, int],
) -> TraceInfo:
    judge, devices, seed = curve_options
    notes = list(source.notes)
    whole_steps, curve, floor = 0, None, None
    try:
        sampled = steps.sample(trace)
        whole_steps, notes = len(sampled), [*notes, *sampled.notes]
        floor = split_half_floor(trace, seed=seed)
        curve = learning_curve(trace, judge=judge, devices=devices, seed=seed)
    except InputError as error:  # too short for one of them: that is an answer, not a failure
        notes.append(str(error))
    return TraceInfo(
        format=source.format, model_name=trace.model_name, tokens=trace.num_tokens,
        layers=trace.num_layers, experts=trace.num_experts, top_k=trace.top_k,
        layer_indices=trace.layer_indices,
        tokens_by_phase=_by_phase(trace), tokens_by_domain=_by_domain(trace),
        requests=_distinct(trace.request), source_ranks=_distinct(trace.source),
        recorded_steps=_distinct(trace.step), steps_available=whole_steps,
        skew_L=_skew(trace.load_LE()), floor_bits=floor, curve=curve,
        cannot_tell=source.cannot_tell, notes=tuple(notes),
    )


def _of_loads(source: ImportResult) -> TraceInfo:
    profile = source.as_profile()
    return TraceInfo(
        format=source.format, model_name=profile.model_name, tokens=profile.num_tokens,
        layers=profile.num_layers, experts=profile.num_experts, top_k=profile.top_k,
        layer_indices=profile.layer_indices, tokens_by_phase=None, tokens_by_domain=None,
        requests=None, source_ranks=None, recorded_steps=None, steps_available=0,
        skew_L=_skew(profile.load_LE), floor_bits=None, curve=None,
        cannot_tell=source.cannot_tell, notes=(*source.notes, "it holds loads only"),
    )


def _skew(load_LE: Any) -> tuple[float, ...]:
    """Hottest expert over mean expert per layer; nan where a layer has no load."""
    with np.errstate(invalid="ignore"):
        return tuple(float(s) for s in load_LE.max(axis=1) / load_LE.mean(axis=1))


def _by_phase(trace: RoutingTrace) -> dict[str, int] | None:
    if trace.phase is None:
        return None
    counts = np.bincount(trace.phase, minlength=len(PHASES))
    return {name: int(count) for name, count in zip(PHASES, counts, strict=True)}


def _by_domain(trace: RoutingTrace) -> dict[str, int] | None:
    if trace.domain is None:
        return None
    counts = np.bincount(trace.domain, minlength=len(trace.domain_names))
    order = np.argsort(-counts, kind="stable")
    return {trace.domain_names[d]: int(counts[d]) for d in order if counts[d]}


def _distinct(column: Any) -> int | None:
    return None if column is None else len(np.unique(column))
