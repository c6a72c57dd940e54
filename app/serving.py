"""A simulated service from what a person says of it: its requests, limits, faults and policy.

Knows the simulator's parts and how they are named. Knows nothing of options, HTTP or printing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..placement.cluster import Cluster
    from ..placement.cost.overlap import Overlap
    from ..simulator.serving.result import Slo
    from ..simulator.serving.simulate import Intervention, Serving
    from ..simulator.serving.workload import Workload
    from ..traces.model_spec import ModelSpec

MOST_IN_FLIGHT = 1024        # requests, where a step can hold so many


def build_slo(ttft_ms: float | None, tpot_ms: float | None) -> Slo | None:
    """The limits; one that is not given is no limit."""
    from ..simulator.serving.result import Slo

    if ttft_ms is None and tpot_ms is None:
        return None
    return Slo(
        math.inf if ttft_ms is None else ttft_ms * 1e3,
        math.inf if tpot_ms is None else tpot_ms * 1e3,
    )


def build_overlap(name: str) -> Overlap | None:
    """The schedule; None for none."""
    from ..placement.cost.overlap import Overlap

    if name not in ("none", "two_batch", "pipeline"):
        raise UsageError(f"unknown overlap {name!r}: none, two_batch or pipeline")
    return None if name == "none" else Overlap(name)  # type: ignore[arg-type]


def build_serving(
    step_tokens: int, max_requests: int | None, prefill: str, kv_bytes_per_token: float | None,
    other_bytes: int | None, groups: int, overlap: str, other_us_per_token: float,
    model: ModelSpec | None = None,
) -> Serving:
    """How the service runs. Other weights that nobody names are those the model tells of."""
    from ..simulator.pricing.memory import MemorySpec
    from ..simulator.serving.batching import BatchLimits
    from ..simulator.serving.simulate import Serving

    if other_bytes is not None and kv_bytes_per_token is None:
        raise UsageError("--other-bytes counts only with --kv-bytes-per-token: name both")
    if other_bytes is None:
        other_bytes = ((None if model is None else model.dense_weights()) or (0, False))[0]
    in_flight = min(MOST_IN_FLIGHT, step_tokens) if max_requests is None else max_requests
    return Serving(
        BatchLimits(step_tokens, in_flight, prefill=prefill),  # type: ignore[arg-type]
        None if kv_bytes_per_token is None else MemorySpec(kv_bytes_per_token, other_bytes),
        groups, build_overlap(overlap), other_us_per_token,
    )


def build_interventions(
    faults: Path | None, policy: str | None, every_steps: int, cluster: Cluster, groups: int
) -> list[Intervention]:
    """The faults of the file, and the policy at work on every serving group."""
    from ..placement.rebalancing.policy import Policy
    from ..simulator.events.fault_file import read_faults
    from ..simulator.events.replan import Replanning

    found: list[Intervention] = [] if faults is None else [*read_faults(faults, cluster, groups)]
    if policy is not None:
        name = policy.replace("-", "_")      # as `run --control` spells it
        rule = Policy(name, every_steps=every_steps)  # type: ignore[arg-type]
        window = min(Replanning(rule).window_steps, every_steps)
        found += [Replanning(rule, window_steps=window, group=g) for g in range(groups)]
    return found


LONGEST_S = 1e9              # from the first Poisson arrival to the last


def build_workload(
    arrivals: Path | None, requests: int, rate: float, prompt_tokens: float, output_tokens: float,
    seed: int, unit: str | None = None,
) -> tuple[Workload, tuple[str, ...]]:
    """The file's earliest requests, or a Poisson process; and how the file was read.

    rate also draws the times of a file that holds lengths alone.
    """
    from ..simulator.serving.workload import as_workload
    from ..traces.arrival_files import load_arrivals
    from ..traces.arrivals import Length, poisson

    if unit is not None and arrivals is None:
        raise UsageError("--arrivals-unit is of the times in a file: name one with --arrivals")
    if arrivals is not None:
        read = load_arrivals(arrivals, unit=unit, most=requests, rate_per_s=rate, seed=seed)
        return as_workload(read), read.notes
    if requests / rate > LONGEST_S:
        raise UsageError(
            f"rate {rate:g}: {requests} requests would take {requests / rate:.3g} s to arrive, "
            f"at most {LONGEST_S:.0e} s are played: raise the rate"
        )
    return as_workload(poisson(
        requests, rate, prompt=Length(prompt_tokens, 1.0), output=Length(output_tokens, 1.0),
        seed=seed,
    )), ()
