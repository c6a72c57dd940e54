"""What one more slot per device would change, where no plan within the slots given does any good.

"Leave it" is true and useless where one expert has most of a layer's tokens and no slot is left for
a replica: the busiest device then waits for that expert under every plan. So a plan with one more
slot is made, by a method that takes no time, and judged on the same requests. Knows plans and
traces. Prints nothing.
"""

from __future__ import annotations

from typing import Any

from ...errors import LoadmasterError
from ...traces.trace import RoutingTrace
from ..cluster import Cluster
from ..comparison.compare import Comparison
from ..comparison.verdict import metric_text
from ..cost.evaluate import evaluate
from ..planning.planner import plan

METHOD = "greedy"
HIGH_PEAK = 1.5          # busiest device over the mean, from which on "fine" needs a word more
WORTH = 0.9              # the slot must bring the figure to this part of it, or less


def one_more_slot(
    table: Comparison, name: str, planning: RoutingTrace, judging: RoutingTrace, cluster: Cluster,
    asked: dict[str, Any],
) -> str:
    """The end of a verdict that leaves everything as it is; empty where no slot would change that.

    asked: dispatch, steps, model, seed, objective and balance_slack, as planned for.
    """
    found = table.evaluations[name]
    if found.peak_mean < HIGH_PEAK:
        return ""
    wider = with_one_more_slot(cluster)
    try:
        more = plan(planning, wider, method=METHOD, **asked)
        judged = evaluate(
            more.plan, judging, wider, steps=asked["steps"], dispatch=asked["dispatch"],
            model=asked["model"],
        )
    except LoadmasterError:         # it does not fit the devices' memory, for one
        return f"; the busiest device has {found.peak_mean:.1f} x the mean"
    timed = table.metric_name == "step_time_us"
    now, new = (e.step_time_us if timed else e.peak_mean for e in (found, judged))
    if now is None or new is None or new > WORTH * now:
        return f"; the busiest device has {found.peak_mean:.1f} x the mean"
    then = metric_text(new, table.metric_name) if timed else f"{new:.2f}"
    return (
        f"; that holds within the slots given, where the busiest device has {found.peak_mean:.1f} "
        f"x the mean: one more slot per device would make it {then}"
    )


def with_one_more_slot(cluster: Cluster) -> Cluster:
    """The same devices, each with a slot more in every layer."""
    devices = tuple(d.model_copy(update={"slots": d.slots + 1}) for d in cluster.devices)
    return Cluster.model_validate(cluster.model_dump() | {"devices": devices})
