"""Staying with a group while it serves: noticing that it broke, ticking its controller, and what
there is to say at its end.

Knows a group's status, measurements and recordings. Starts and stops nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from ...errors import LoadmasterError, UsageError
from ...placement.cluster import Cluster
from ...placement.plan import Plan
from ...traces.model_spec import ModelSpec
from ...traces.recording.recorder import RecordingSummary
from ..coordinator.step_log import Measurements
from .controller import Controller
from .switch_preview import resized

POLL_S = 1.0


class Watched(Protocol):
    """What watching needs of a group."""

    def status(self) -> dict[str, Any]: ...


def watch(
    group: Watched, controller: Controller | None = None, *, poll_s: float = POLL_S,
    on_trouble: Callable[[str], None] = lambda text: None,
) -> NoReturn:
    """Until interrupted, or until the group serves no more: then LoadmasterError says why.

    on_trouble: called once with each thing that goes wrong while serving goes on, and once it is
    over.
    """
    trouble = ""
    while True:
        status = group.status()
        if status["broken"]:
            raise LoadmasterError(f"the group does not serve any more: {status['broken']}")
        before, trouble = trouble, status.get("recording_trouble", "")
        if trouble != before and (trouble or status["recording"]):
            on_trouble(f"recording: {trouble or 'can be written again'}")
        if controller is not None and controller.due():
            controller.tick()
        else:
            time.sleep(poll_s)


def roomy_cluster(status: dict[str, Any], slots: int | None) -> Cluster:
    """The devices that a controller plans for: the group's own where they are known, with slots
    for its plan, for an even share and a quarter of the experts, or for `slots`."""
    plan: Plan = status["plan"]
    share = -(-plan.num_experts // plan.num_devices)
    room = share + max(1, round(share / 4)) if slots is None else slots
    if slots is not None and slots < share:
        raise UsageError(
            f"{slots} slots per rank cannot hold {plan.num_experts} experts on {plan.num_devices} "
            f"ranks: at least {share} are needed"
        )
    known = status.get("cluster")
    given = known if known is not None else Cluster.preset(
        "cpu", devices_per_node=plan.num_devices, slots_per_device=room
    )
    return resized(given, plan.num_devices, max(room, plan.slots_per_device))


def recording_report(parts: Sequence[RecordingSummary]) -> str:
    """What all ranks kept, and what was lost and why; empty where nothing was recorded."""
    kept, lost = sum(p.tokens for p in parts), sum(p.lost_tokens for p in parts)
    if not kept and not lost:
        return ""
    failures = list(dict.fromkeys(p.failure for p in parts if p.failure))
    why = f" ({'; '.join(failures)})" if failures else ""
    return f"recorded {kept:,} tokens on {len(parts)} ranks; lost {lost:,}{why}"


def capacity_report(steps: Measurements, model: ModelSpec) -> str:
    """What a capacity rule did to the last steps: the share dropped, the busiest expert's load."""
    computed_WL, dropped_WL = steps.tokens.sum(axis=2), steps.dropped.sum(axis=2)
    total_WL = computed_WL + dropped_WL
    busy = total_WL > 0
    if not busy.any():
        return "capacity rule: no step has run"
    share = float(dropped_WL.sum() / total_WL.sum())
    peak = (steps.peak[busy] * model.num_experts / total_WL[busy]).max()
    return (
        f"capacity rule, last {len(steps.step):,} steps: dropped {share:.2%} of the assignments; "
        f"the busiest expert took at most {peak:.2f} x the mean"
    )
