"""What a plan is searched on and judged on: steps of a trace, or average loads where no trace is.

Splits requests into a planning part and a validation part, cuts both into steps, and counts one
layer at a time. Knows traces and steps. Knows nothing of devices beyond their number, of plans or
of search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..traces.steps import Steps, StepSampler, count_steps, count_steps_by_home
from ..traces.trace import RoutingTrace

FloatArray = npt.NDArray[np.float64]
CountArray = npt.NDArray[np.int32]

VALIDATION_SHARE = 0.25     # of requests
PLANNING_STEPS = 192
VALIDATION_STEPS = 96
FEWEST_VALIDATION_STEPS = 4
MOST_PASSES = 8             # through the same tokens, each with another seed


@dataclass(frozen=True)
class PlanningSteps:
    """Steps to search on (`planning`) and, apart, to decide on (`validation`).

    Without a trace only `load_WLE` is there: each row is one step of average loads.
    """

    trace: RoutingTrace | None
    planning: Steps | None
    validation: Steps | None
    load_WLE: FloatArray | None
    num_experts: int
    num_layers: int
    notes: tuple[str, ...] = ()
    said: str = ""

    def planning_WE(self, layer: int) -> FloatArray:
        """[W, E] tokens per planning step and expert of one layer."""
        if self.load_WLE is not None:
            return np.ascontiguousarray(self.load_WLE[:, layer], np.float64)
        assert self.trace is not None and self.planning is not None
        return count_steps(self.trace, self.planning, layer).astype(np.float64)

    def planning_WGE(self, layer: int, devices: int) -> CountArray:
        """[W, G, E] the same by home rank."""
        assert self.trace is not None and self.planning is not None
        return count_steps_by_home(self.trace, self.planning, layer, devices)

    def validation_WE(self, layer: int) -> FloatArray | None:
        """[W, E] tokens per validation step; None where nothing was held back."""
        if self.trace is None or self.validation is None:
            return None
        return count_steps(self.trace, self.validation, layer).astype(np.float64)

    def validation_WGE(self, layer: int, devices: int) -> CountArray | None:
        """[W, G, E] the same by home rank."""
        if self.trace is None or self.validation is None:
            return None
        return count_steps_by_home(self.trace, self.validation, layer, devices)


def steps_of_trace(trace: RoutingTrace, sampler: StepSampler) -> PlanningSteps:
    """Hold back a quarter of the requests, cut both parts into steps.

    In `recorded` order the last quarter of the steps is held back instead. Nothing is held back
    when a part would not fill FEWEST_VALIDATION_STEPS steps; the notes say so.
    Raises InputError when the whole trace does not fill one step.
    """
    if sampler.order == "recorded":
        planning, validation = _cut_in_time(sampler.sample(trace))
    else:
        planning_tokens, validation_tokens = _split_tokens(trace, sampler.seed)
        planning = _passes(trace, planning_tokens, sampler, PLANNING_STEPS)
        validation = _passes(trace, validation_tokens, sampler, VALIDATION_STEPS)
    notes: list[str] = []
    if planning is None or validation is None or len(validation) < FEWEST_VALIDATION_STEPS:
        planning, validation = sampler.sample(trace, PLANNING_STEPS), None
        notes.append("too short a trace to hold back a validation part")
    said = (
        f"{len(planning)} planning and {0 if validation is None else len(validation)} validation "
        f"steps of {sampler.tokens} tokens, {sampler.order}, {sampler.concurrency} in flight"
    )
    return PlanningSteps(
        trace, planning, validation, None, trace.num_experts, trace.num_layers,
        tuple(dict.fromkeys((*planning.notes, *notes))), said,
    )


def steps_of_loads(load_WLE: npt.ArrayLike) -> PlanningSteps:
    """Average loads as steps: [W, L, E], finite and >= 0. Raises InputError otherwise."""
    loads = np.asarray(load_WLE, np.float64)
    if loads.ndim != 3 or 0 in loads.shape:
        raise InputError(f"loads must be [windows, layers, experts]; got {list(loads.shape)}")
    if not np.isfinite(loads).all() or (loads < 0).any():
        w, layer, expert = np.argwhere(~np.isfinite(loads) | (loads < 0))[0]
        raise InputError(
            f"window {w}, layer {layer}, expert {expert}: load {loads[w, layer, expert]}; loads "
            "must be finite and >= 0"
        )
    return PlanningSteps(
        None, None, None, loads, loads.shape[2], loads.shape[1],
        ("planned for load only: no steps, requests or homes were recorded",),
        f"{len(loads)} windows of average load",
    )


def _split_tokens(
    trace: RoutingTrace, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token indices (planning, validation), split by request at random."""
    request_T = trace.request_T()
    unique = np.unique(request_T)
    order = np.random.default_rng([seed, 1]).permutation(unique)
    held = np.isin(request_T, order[: round(VALIDATION_SHARE * len(order))])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _cut_in_time(steps: Steps) -> tuple[Steps, Steps | None]:
    """The earlier three quarters of the steps and the later quarter, each thinned to its limit."""
    cut = len(steps) - round(VALIDATION_SHARE * len(steps))
    earlier = np.unique(np.linspace(0, cut - 1, min(cut, PLANNING_STEPS)).astype(np.int64))
    if cut == len(steps):
        return steps.take(earlier), None
    later = np.linspace(cut, len(steps) - 1, min(len(steps) - cut, VALIDATION_STEPS))
    return steps.take(earlier), steps.take(np.unique(later.astype(np.int64)))


def _passes(
    trace: RoutingTrace, tokens: npt.NDArray[np.int64], sampler: StepSampler, wanted: int
) -> Steps | None:
    """Up to `wanted` steps of some of the trace's tokens (indices into the whole trace).

    Sampling ends when a request in flight cannot be replaced, so at most a quarter of the requests
    are in flight at once, and the tokens are passed through again with another seed until there
    are enough steps. None if the tokens do not fill one step.
    """
    if len(tokens) < sampler.tokens:
        return None
    part = trace.select(tokens)
    requests = len(np.unique(part.request_T()))
    in_flight = min(sampler.concurrency, max(1, requests // 4))
    found: list[Steps] = []
    for turn in range(MOST_PASSES if sampler.order != "stored" else 1):
        again = replace(sampler, concurrency=in_flight, seed=sampler.seed + 7919 * turn)
        try:
            steps = again.sample(part, wanted - sum(map(len, found)))
        except InputError:      # not one whole step in this order
            continue
        found.append(steps)
        if sum(map(len, found)) >= wanted:
            break
    if not found:
        return None
    sizes = np.concatenate([np.diff(s.offset) for s in found])
    order = np.concatenate([s.token for s in found])
    offset = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return Steps(tokens[order], offset, found[0].notes)
