"""Two halves of the requests: what is searched on one half is judged on the other, both ways.

Steps share requests, so a few requests can make many steps that agree with each other and with
nothing else; confidence in a gain comes from resampling requests. Knows requests and steps. Knows
nothing of plans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...errors import InputError
from ...traces.steps import Steps, StepSampler
from ...traces.trace import RoutingTrace
from ..held_back import EVEN_SHARE
from ..planning_traffic import PlanningSteps, planning_steps
from .bootstrap import FEWEST_REQUESTS, Redrawn, redraw

LEAST_STEP = 32        # tokens; a half that fills no larger step tells nothing
MOST_REDRAWN = 4       # steps of each draw


@dataclass(frozen=True)
class Half:
    """Steps to search on and judge by, nothing held back; and steps of other draws of requests."""

    data: PlanningSteps
    redrawn: Redrawn


def request_halves(
    trace: RoutingTrace, sampler: StepSampler, seed: int
) -> tuple[Half, Half] | None:
    """Both halves, drawn at random. None = too few requests or tokens to tell gain from chance."""
    if len(np.unique(trace.request_T())) < 2 * FEWEST_REQUESTS:
        return None
    first, second = (_half(part, sampler, seed) for part in trace.split(EVEN_SHARE, seed=seed))
    return None if first is None or second is None else (first, second)


def _half(part: RoutingTrace, sampler: StepSampler, seed: int) -> Half | None:
    """One half; steps are made smaller where it, or draws of its requests, fill no larger ones."""
    tokens = min(sampler.tokens, part.num_tokens // 2)      # or draws of its requests fill none
    while tokens >= min(LEAST_STEP, sampler.tokens):
        found = _cut(part, replace(sampler, tokens=tokens), seed)
        if found is not None:
            return found
        tokens //= 2
    return None


def _cut(part: RoutingTrace, sampler: StepSampler, seed: int) -> Half | None:
    try:
        data = planning_steps(part, sampler)
    except InputError:          # not one step
        return None
    assert data.planning is not None
    whole = data.planning if data.validation is None else joined(data.planning, data.validation)
    few = whole.take(np.arange(min(len(whole), MOST_REDRAWN)))
    redrawn = redraw(part, sampler, few, seed)
    if redrawn is None:         # too few requests, or too few tokens in most draws
        return None
    return Half(replace(data, planning=whole, validation=None), redrawn)


def joined(first: Steps, second: Steps) -> Steps:
    """The steps of both."""
    offset = np.concatenate((first.offset, first.offset[-1] + second.offset[1:]))
    return Steps(np.concatenate((first.token, second.token)), offset, first.notes)
