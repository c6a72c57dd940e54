"""What was promised of a plan, and whether it is kept on the traffic at hand.

A plan that `advise` chose carries what its judges said: a figure, its band, their steps. Wherever
the plan is judged again, the two are set side by side: a difference beyond both bands means traffic
unlike the plan's own. Knows plans' evidence and rows of figures. Knows nothing of how plans are
found.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..plan import Plan, Promise
from .verdict import WORDS, metric_text


def with_promise(
    plan: Plan, metric: str, value: float, reach: float, sampler: StepSampler,
    judging: RoutingTrace, whole: RoutingTrace,
) -> Plan:
    """The plan with what was found of it on `judging`, a part of `whole` that it was not made from.

    A plan without evidence of its own is left as it is.
    """
    if plan.evidence is None:
        return plan
    promise = Promise(
        metric=metric, value=value, reach=reach if math.isfinite(reach) else None,
        requests=len(np.unique(judging.request_T())), step_tokens=sampler.tokens,
        concurrency=sampler.concurrency, order=sampler.order, trace_digest=whole.digest(),
    )
    return dataclasses.replace(plan, evidence=plan.evidence.model_copy(update={"promise": promise}))


def kept(
    name: str, plan: Plan, metric: str, value: float, reach: float, sampler: StepSampler,
    digest: str,
) -> tuple[str, ...]:
    """What to know of a plan judged on a trace of this digest: its own traffic, or unlike it."""
    made_from = plan.provenance.trace_digest
    if made_from and made_from == digest:
        return (
            f"{name} was made from these very requests: they flatter it, others will not",
        )
    promise = None if plan.evidence is None else plan.evidence.promise
    if promise is None:
        return ()
    own = promise.trace_digest == digest
    notes = (
        f"{name} was made from part of this trace: the requests it was planned on flatter it",
    ) if own else ()
    if promise.metric != metric or promise.reach is None or not math.isfinite(reach):
        return notes
    asked = (sampler.tokens, sampler.concurrency, sampler.order)
    other_steps = asked != (promise.step_tokens, promise.concurrency, promise.order)
    was, now = metric_text(promise.value, metric), metric_text(value, metric)
    said = f"{name}: promised {was}, here {now}"
    if other_steps:
        return (
            *notes,
            f"{said} in other steps: it was judged in steps of {promise.step_tokens} tokens, "
            f"{promise.order}, {promise.concurrency} in flight",
        )
    gap, noise = value - promise.value, math.hypot(promise.reach, reach)
    if own or abs(gap) <= noise:
        return notes
    return (
        f"{said}: a difference beyond the noise of {noise:.2g}; this traffic is unlike what it was "
        f"made from, and its {WORDS[metric]} says so" if gap > 0 else
        f"{said}: better beyond the noise of {noise:.2g}; this traffic is unlike what it was made "
        "from",
    )
