"""Other steps that the same kind of requests could have made: an ordinary bootstrap over requests.

For traces in which most requests are in flight throughout, so that the steps alone hardly tell how
others would do. A draw takes as many requests as the trace has, with replacement, and cuts them
into steps the way the trace was cut. Knows requests and steps. Knows nothing of plans.
Deterministic for a seed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from ...foundation.arrays import FloatArray, IntArray
from ...traces.steps import Steps, StepSampler
from ...traces.trace import RoutingTrace
from .intervals import few_draws_factor

FEWEST_REQUESTS = 5          # fewer say nothing about others
DRAWS = 200
# Effects of real requests have longer tails than normal ones: without this, bands of levels held in
# 95 % and those of changes in 92 % (`benchmarks/field_coverage.py`). As many as these count as one.
LEVEL_TAILS, CHANGE_TAILS = 1.0, 3.0
LEAST_PART = 0.1             # of the draws' variance is left, however much single steps scatter
MOST_CHOICES = 1 << 24       # expert choices of all draws together; steps are thinned to keep to it


@dataclass(frozen=True, eq=False)
class Redrawn:
    """Steps of many draws, to be judged in one go, and which draw each belongs to.

    thinner: by how much the mean of a draw's fewer steps scatters more than the mean of as many as
    were judged does, in variances of a single step: 1 / steps of a draw - 1 / steps judged.
    """

    steps: Steps
    draw_W: IntArray
    requests: int
    equal_requests: float
    thinner: float = 0.0
    lean: float = 0.0

    @property
    def draws(self) -> int:
        """How many."""
        return int(self.draw_W.max()) + 1

    def noise(
        self, value_W: FloatArray, judged: float | None = None, tails: float = LEVEL_TAILS
    ) -> FloatArray:
        """[B] each draw's mean over its steps less the judged one: how far a mean like that may be
        off. NaN steps are left out; judged None = the mean of all draws.

        What single steps scatter within a draw, and a draw's steps are fewer than were judged, is
        taken off (analysis of variance); then widened where requests are few. Where fewer requests
        were recorded than are in flight, the judged steps are less even than traffic's own, as
        draws are less even than the judged steps: `lean` of that difference is added.
        """
        kept = ~np.isnan(value_W)
        draw_W, value_W = self.draw_W[kept], value_W[kept]
        count_B = np.bincount(draw_W, minlength=self.draws)
        held_B = count_B > 0
        mean_B = np.bincount(draw_W, weights=value_W, minlength=len(count_B)) / np.maximum(
            count_B, 1
        )
        within = float(((value_W - mean_B[draw_W]) ** 2).sum())
        freedom = max(len(value_W) - int(held_B.sum()), 1)
        noise_B = mean_B[held_B] - mean_B[held_B].mean()
        total = float(noise_B.var())
        of_steps = within / freedom * self.thinner
        kept_part = max(1.0 - of_steps / total, LEAST_PART) if total > 0 else 1.0
        worth = self.equal_requests
        wider = few_draws_factor(worth, 1 / (tails / worth + 1 / self.draws))
        apart = 0.0 if judged is None else float(mean_B[held_B].mean()) - judged
        return np.asarray(noise_B * np.sqrt(kept_part) * wider + self.lean * apart, np.float64)


def redraw(
    trace: RoutingTrace, sampler: StepSampler, whole: Steps, seed: int
) -> Redrawn | None:
    """Draws of the trace's requests, each cut into at most as many steps as `whole`, the sampler's
    own of this trace. None = too few requests.

    In `recorded` order a step keeps the tokens that its drawn requests had in it; in any other the
    sampler cuts the drawn requests anew.
    """
    request_T = np.unique(trace.request_T(), return_inverse=True)[1].astype(np.int64)
    requests = int(request_T.max()) + 1
    if requests < FEWEST_REQUESTS:
        return None
    order = np.argsort(request_T, kind="stable").astype(np.int64)
    start = np.searchsorted(request_T[order], np.arange(requests + 1))
    choices = len(whole.token) * trace.num_layers * trace.top_k
    most = max(1, min(len(whole), len(whole) * MOST_CHOICES // max(DRAWS * choices, 1)))
    rng = np.random.default_rng([seed, 5])
    found: list[Steps] = []
    draw: list[int] = []
    for _ in range(DRAWS):
        drawn = np.sort(rng.integers(0, requests, requests))
        cut = _cut(trace, sampler, drawn, order, start, len(whole))
        if cut is not None:
            found.append(_thinned(cut, most))
            draw += [len(found) - 1] * len(found[-1])
    if len(found) < DRAWS // 4:
        return None
    sizes = np.concatenate([np.diff(s.offset) for s in found])
    token = np.concatenate([s.token for s in found])
    offset = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    # Draws of recorded steps share the steps: none of their scatter is of single steps.
    per_draw = len(sizes) / len(found)
    thinner = 0.0 if sampler.order == "recorded" else max(0.0, 1 / per_draw - 1 / len(whole))
    length = np.diff(start)
    worth = float(length.sum()) ** 2 / float((length.astype(np.float64) ** 2).sum())
    crowded = sampler.order == "interleaved"
    lean = max(0.0, 1.0 - requests / sampler.concurrency) if crowded else 0.0
    return Redrawn(Steps(token, offset), np.array(draw, np.int64), requests, worth, thinner, lean)


def _cut(
    trace: RoutingTrace, sampler: StepSampler, drawn: IntArray, order: IntArray, start: IntArray,
    most: int,
) -> Steps | None:
    """The drawn requests (a request drawn twice is two requests) in steps of the trace's tokens."""
    parts = [order[start[r] : start[r + 1]] for r in drawn]
    token = np.concatenate(parts)
    request = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    # Steps depend on requests and recorded steps alone: the experts are left behind.
    bare = RoutingTrace.from_arrays(
        np.zeros((len(token), 1, 1), np.uint8), num_experts=1, request=request,
        step=None if trace.step is None else trace.step[token],
    )
    try:
        cut = sampler.sample(bare, most)
    except InputError:          # the drawn requests do not fill one step
        return None
    return dataclasses.replace(cut, token=token[cut.token])


def _thinned(steps: Steps, most: int) -> Steps:
    if len(steps) <= most:
        return steps
    return steps.take(np.unique(np.linspace(0, len(steps) - 1, most).astype(np.int64)))
