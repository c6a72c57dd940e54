"""What a plan is searched on and judged on: steps of a trace, or average loads where no trace is.

Splits requests into a planning part and a validation part, cuts both into steps, and hands out one
layer at a time. Knows traces and steps. Knows nothing of devices, plans or search.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..foundation.arrays import FloatArray, Int32Array
from ..foundation.compiled import compiled
from ..traces.profile import Profile
from ..traces.steps import Steps, StepSampler
from ..traces.trace import RoutingTrace
from .held_back import VALIDATION_SHARE

STEP_ASSIGNMENTS = 1 << 20  # choices of one layer to search on: more steps teach little more
MOST_STEPS, FEWEST_STEPS = 64, 16
MOST_TIMED_STEPS = 256      # for time: which experts are used at all differs more between steps
FEWEST_VALIDATION_STEPS = 2
FEW_IN_FLIGHT = 16          # a second set of steps has this many times fewer requests in flight
LEAST_STEP = 32             # tokens
MOST_PASSES = 8             # through the same tokens, each with another seed
MOST_REQUESTS = 512         # whose loads shape the scenarios
LOAD_TOTAL = 1 << 28        # units a layer's largest window of average loads is counted in


@dataclass(frozen=True)
class LayerTraffic:
    """One layer's share of the planning data; picklable, and all that a job needs to know."""

    trace: RoutingTrace | None       # this layer alone: ids [T, 1, K]
    planning: Steps | None
    extra: tuple[Steps, ...]         # planning tokens again, in other steps to search on
    validation: Steps | None
    load_WE: FloatArray | None       # average loads in LOAD_TOTAL's units, where there is no trace
    num_experts: int
    counted: float | None = None     # assignments a unit stands for, where loads are whole counts

    def planning_WE(self) -> FloatArray:
        """[W, E] tokens per planning step and expert."""
        if self.load_WE is not None:
            return self.load_WE
        return self._counts(self.planning)

    def search_WE(self) -> FloatArray:
        """[W, E] planning (as many as serve balance) and extra steps."""
        if self.load_WE is not None:
            return self.load_WE
        assert self.planning is not None
        parts = [self.planning.take(np.arange(min(len(self.planning), MOST_STEPS))), *self.extra]
        return np.concatenate([self._counts(s) for s in parts])

    def request_RE(self) -> FloatArray:
        """[R, E] load of each request of the planning part; windows where there is no trace."""
        return self._request_RE if self.load_WE is None else self.load_WE

    @functools.cached_property
    def _request_RE(self) -> FloatArray:
        assert self.trace is not None and self.planning is not None
        used_T = np.zeros(self.trace.num_tokens, bool)
        used_T[self.planning.token] = True
        tokens = np.flatnonzero(used_T)
        _, place = np.unique(self.trace.request_T()[tokens], return_inverse=True)
        row = place.astype(np.int64) % MOST_REQUESTS
        load = np.zeros((int(row.max()) + 1, self.num_experts))
        ids = self.trace.ids[tokens, 0].astype(np.int64)
        cell = row[:, None] * self.num_experts + ids
        if self.trace.k_of_token is not None:
            cell = cell[np.arange(ids.shape[1]) < self.trace.k_of_token[tokens, 0][:, None]]
        load += np.bincount(cell.reshape(-1), minlength=load.size).reshape(load.shape)
        return load

    def thinned(self, most: int) -> LayerTraffic:
        """The same with so many steps of each part at most, spread over it."""
        if self.load_WE is not None:
            return replace(self, load_WE=self.load_WE[_thinned(0, len(self.load_WE), most)])
        planning, validation = (
            None if steps is None else steps.take(_thinned(0, len(steps), most))
            for steps in (self.planning, self.validation)
        )
        return replace(self, planning=planning, validation=validation, extra=())

    def counts(self, steps: Steps) -> Int32Array:
        """[W, E] tokens per step and expert, whole numbers."""
        assert self.trace is not None
        k_T = self.trace.k_of_token
        counted = np.zeros((len(steps), self.num_experts), np.int32)
        _count(
            np.ascontiguousarray(self.trace.ids[:, 0]), steps.token, steps.offset,
            np.empty(0, np.uint8) if k_T is None else np.ascontiguousarray(k_T[:, 0]), counted,
        )
        return counted

    def _counts(self, steps: Steps | None) -> FloatArray:
        assert steps is not None
        return self.counts(steps).astype(np.float64)


@dataclass(frozen=True)
class PlanningSteps:
    """Steps to search on (`planning`, `extra`) and, apart, to decide on (`validation`).

    Without a trace only `load_WLE` is there: each row is one step of average loads.
    """

    trace: RoutingTrace | None
    planning: Steps | None
    extra: tuple[Steps, ...]
    validation: Steps | None
    load_WLE: FloatArray | None
    num_experts: int
    num_layers: int
    layer_indices: tuple[int, ...]
    notes: tuple[str, ...] = ()
    summary: str = ""
    counted_L: FloatArray | None = None      # see `LayerTraffic.counted`

    def layer(self, layer: int) -> LayerTraffic:
        """One layer's share."""
        if self.load_WLE is not None:
            loads = np.ascontiguousarray(self.load_WLE[:, layer], np.float64)
            counted = None if self.counted_L is None else float(self.counted_L[layer])
            return LayerTraffic(None, None, (), None, loads, self.num_experts, counted)
        assert self.trace is not None
        return LayerTraffic(
            one_layer(self.trace, layer), self.planning, self.extra, self.validation, None,
            self.num_experts,
        )


def planning_steps(
    source: RoutingTrace | Profile, sampler: StepSampler, *, most_steps: int = MOST_STEPS
) -> PlanningSteps:
    """Steps of a trace or of a profile's sample; average loads of a load-only profile."""
    if isinstance(source, Profile):
        if source.sample is None:
            return _steps_of_loads(source)
        return _steps_of_trace(source.sample, sampler, most_steps)
    return _steps_of_trace(source, sampler, most_steps)


def one_layer(trace: RoutingTrace, layer: int) -> RoutingTrace:
    """The trace of one MoE layer; gates are left out, planning does not read them."""
    k_TL = trace.k_of_token
    indices = trace.layer_indices[layer : layer + 1]
    ids: Any = np.ascontiguousarray(trace.ids[:, layer : layer + 1])
    return dataclasses.replace(
        trace, ids=ids, gates=None,
        k_of_token=None if k_TL is None else np.ascontiguousarray(k_TL[:, layer : layer + 1]),
        layer_indices=indices,
    )


def _steps_of_trace(
    trace: RoutingTrace, sampler: StepSampler, most_steps: int
) -> PlanningSteps:
    """Hold back a quarter of the requests, cut both parts into steps.

    In `recorded` order the last quarter of the steps is held back instead. Nothing is held back
    when a part would not fill enough steps; the notes say so.
    Raises InputError when the whole trace does not fill one step.
    """
    wanted = STEP_ASSIGNMENTS // (sampler.tokens * trace.top_k)
    most = int(np.clip(wanted, FEWEST_STEPS, most_steps))
    notes: list[str] = []
    extra: tuple[Steps, ...] = ()
    planning: Steps | None
    validation: Steps | None
    if sampler.order == "recorded":
        planning, validation = _cut_in_time(sampler.sample(trace), most)
    else:
        planning_tokens, validation_tokens = _split_tokens(trace, sampler.seed)
        planning = _passes(trace, planning_tokens, sampler, most)
        validation = _passes(trace, validation_tokens, sampler, most)
        if planning is None or validation is None or len(validation) < FEWEST_VALIDATION_STEPS:
            planning_tokens, validation = np.arange(trace.num_tokens), None
            planning = _passes(trace, planning_tokens, sampler, most)
            if planning is None:
                planning = sampler.sample(trace, most)    # says what is missing
        if sampler.order == "interleaved":
            extra = _other_steps(trace, planning_tokens, sampler, min(most, MOST_STEPS) // 2)
    if validation is None:
        notes.append("too short a trace to hold back a validation part")
    summary = (
        f"{len(planning)} planning and {0 if validation is None else len(validation)} validation "
        f"steps of {sampler.tokens} tokens, {sampler.order}, {sampler.concurrency} in flight"
    )
    return PlanningSteps(
        trace, planning, extra, validation, None, trace.num_experts, trace.num_layers,
        trace.layer_indices, tuple(dict.fromkeys((*planning.notes, *notes))), summary,
    )


def _steps_of_loads(profile: Profile) -> PlanningSteps:
    """Average loads as steps, one per window; windows of any scale have equal weight."""
    load_WLE, counted_L = in_units(np.asarray(profile.load_WLE, np.float64))
    return PlanningSteps(
        None, None, (), None, load_WLE, profile.num_experts, profile.num_layers,
        profile.layer_indices,
        ("planned for load only: no steps, requests or homes were recorded",),
        f"average loads in {profile.num_windows} windows", counted_L,
    )


def in_units(load_WLE: FloatArray) -> tuple[FloatArray, FloatArray | None]:
    """(loads [W, L, E] of any size in like units, what a unit of each layer counts [L]).

    A layer's largest window becomes LOAD_TOTAL, and every window a whole number of its own
    LOAD_TOTAL-th parts: the same loads times any number become the same units, so they get the
    same plan, and every rule of dispatch splits them without rounding. The second is None where
    loads are not whole counts, whose noise would be known.
    """
    total_WL = load_WLE.sum(axis=2)
    most_L = total_WL.max(axis=0)
    share_WLE = load_WLE / np.where(total_WL > 0, total_WL, 1.0)[:, :, None]
    part_WLE = np.rint(share_WLE * LOAD_TOTAL)
    heaviest_WL = part_WLE.argmax(axis=2)[:, :, None]
    off_WL = np.where(total_WL > 0, LOAD_TOTAL - part_WLE.sum(axis=2), 0.0)[:, :, None]
    heaviest = np.take_along_axis(part_WLE, heaviest_WL, axis=2) + off_WL
    np.put_along_axis(part_WLE, heaviest_WL, heaviest, axis=2)
    # Single precision: two scales of the same loads differ in the last digit of a quotient.
    size_WL = (total_WL / np.where(most_L > 0, most_L, 1.0)).astype(np.float32)
    counted = (load_WLE == np.rint(load_WLE)).all()
    return part_WLE * size_WL[:, :, None], most_L / LOAD_TOTAL if counted else None


def _split_tokens(
    trace: RoutingTrace, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token indices (planning, validation), split by request at random."""
    request_T = trace.request_T()
    unique = np.unique(request_T)
    order = np.random.default_rng([seed, 1]).permutation(unique)
    held = np.isin(request_T, order[: round(VALIDATION_SHARE * len(order))])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _cut_in_time(steps: Steps, most: int) -> tuple[Steps, Steps | None]:
    """The earlier three quarters of the steps and the later quarter, each thinned to `most`."""
    cut = len(steps) - round(VALIDATION_SHARE * len(steps))
    if len(steps) - cut < FEWEST_VALIDATION_STEPS:
        return steps.take(_thinned(0, len(steps), most)), None
    return steps.take(_thinned(0, cut, most)), steps.take(_thinned(cut, len(steps), most))


def _thinned(start: int, stop: int, most: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(start, stop - 1, min(stop - start, most)).astype(np.int64))


def _passes(
    trace: RoutingTrace, tokens: npt.NDArray[np.int64], sampler: StepSampler, wanted: int,
    *, passes: int | None = None,
) -> Steps | None:
    """Up to `wanted` steps of some of the trace's tokens, as indices into the whole trace.

    A pass has every token in flight once; where it makes too few steps, others, with other seeds,
    follow. None if the tokens do not fill one step.
    """
    if len(tokens) < sampler.tokens:
        return None
    part = trace.select(tokens)
    found: list[Steps] = []
    turns = (1 if sampler.order == "stored" else MOST_PASSES) if passes is None else passes
    for turn in range(turns):
        again = replace(sampler, seed=sampler.seed + 7919 * turn)
        found.append(again.sample(part, wanted - sum(map(len, found))))
        if sum(map(len, found)) >= wanted:
            break
    sizes = np.concatenate([np.diff(s.offset) for s in found])
    order = np.concatenate([s.token for s in found])
    offset = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return Steps(tokens[order], offset, found[0].notes)


def _other_steps(
    trace: RoutingTrace, tokens: npt.NDArray[np.int64], sampler: StepSampler, wanted: int
) -> tuple[Steps, ...]:
    """Steps with few requests in flight; and, where the trace has fewer requests than are in flight
    in a step, smaller steps in which each contributes only as much as it would among them all.
    """
    few = replace(
        sampler, concurrency=max(1, sampler.concurrency // FEW_IN_FLIGHT), seed=sampler.seed + 1
    )
    found = [_passes(trace, tokens, few, wanted)]
    requests = len(np.unique(trace.request_T()[tokens]))
    if requests < sampler.concurrency:
        share = max(LEAST_STEP, sampler.tokens * requests // sampler.concurrency)
        found.append(_passes(trace, tokens, replace(sampler, tokens=share), wanted, passes=1))
    return tuple(steps for steps in found if steps is not None)


@compiled
def _count(ids_TK: Any, token: Any, offset: Any, k_T: Any, counts_WE: Any) -> None:
    for w in range(len(offset) - 1):
        row = counts_WE[w]
        for a in range(offset[w], offset[w + 1]):
            t = token[a]
            kept = ids_TK.shape[1] if len(k_T) == 0 else int(k_T[t])
            for k in range(kept):
                row[ids_TK[t, k]] += 1
