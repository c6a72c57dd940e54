"""How many steps there is time to judge plans on, where a time limit stands.

One plan is judged on few steps first, by the clock. Knows plans and steps. Knows nothing of what
the limit is for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from ...traces.model_spec import ModelSpec
from ...traces.steps import StepSampler
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..cost.evaluate import evaluate
from ..plan import DispatchSpec, Plan

TRIED_STEPS = 2              # by which the rest are reckoned
LEAST_STEPS = 8              # fewer tell nothing of noise


def steps_in_time(
    plans: Mapping[str, Plan], trace: RoutingTrace, cluster: Cluster, steps: StepSampler,
    dispatch: str | DispatchSpec | None, model: ModelSpec | None, seconds: float | None,
) -> int | None:
    """Steps on which all plans can be judged in so many seconds, LEAST_STEPS at least; None = all.

    Raises InputError where the trace does not fill one step.
    """
    if seconds is None:
        return None
    cut, first = steps.sample(trace), next(iter(plans.values()))
    few = cut.take(np.arange(min(TRIED_STEPS, len(cut))))
    began = time.monotonic()
    evaluate(first, trace, cluster, steps=few, dispatch=dispatch, model=model)
    each = (time.monotonic() - began) / len(few)
    left = seconds - (time.monotonic() - began)
    most = max(LEAST_STEPS, int(left / (each * len(plans))))
    return None if most >= len(cut) else most
