"""Options that say how a simulated service runs and what befalls it, and what they build."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .workload_options import above_zero, whole, within

if TYPE_CHECKING:
    from ..placement.cluster import Cluster
    from ..placement.cost.overlap import Overlap
    from ..simulator.serving.result import Slo
    from ..simulator.serving.simulate import Happening, Serving

MOST_IN_FLIGHT = 1024        # requests, where a step has room for so many

Dispatch = Annotated[
    str | None, typer.Option(help="Serve all plans under this dispatch [default: each its own].")
]
SloTtftMs = Annotated[
    float | None,
    typer.Option(help="Limit of the first token; goodput counts requests within the limits.",
                 callback=above_zero("--slo-ttft-ms")),
]
SloTpotMs = Annotated[
    float | None,
    typer.Option(help="Limit of the mean time of each further token.",
                 callback=above_zero("--slo-tpot-ms")),
]
TokenBudget = Annotated[
    int,
    typer.Option("--step-tokens", help="Tokens of a step, at most.",
                 callback=whole("--step-tokens", 1)),
]
MaxRequests = Annotated[
    int | None,
    typer.Option(help="Requests in flight, at most [default: 1024, or as many as a step holds].",
                 callback=whole("--max-requests", 1)),
]
Prefill = Annotated[
    str, typer.Option(help="chunked: beside decoding requests; first: prompts go alone.")
]
KvBytesPerToken = Annotated[
    float | None,
    typer.Option(help="KV cache of a token, all layers [default: memory is no limit].",
                 callback=above_zero("--kv-bytes-per-token")),
]
OtherBytes = Annotated[
    int | None,
    typer.Option(help="Weights beside the experts on each device, with --kv-bytes-per-token.",
                 callback=whole("--other-bytes", 0)),
]
Groups = Annotated[
    int, typer.Option(help="Equal clusters behind one queue.", callback=whole("--groups", 1, 64))
]
OverlapName = Annotated[
    str, typer.Option("--overlap", help="Exchange beside compute: none, two_batch or pipeline.")
]
OtherUsPerToken = Annotated[
    float,
    typer.Option(help="Attention and dense layers: microseconds per token of a device.",
                 callback=within("--other-us-per-token", 0, 1e6)),
]
FaultsPath = Annotated[
    Path | None,
    typer.Option("--faults", help="What goes wrong (YAML or JSON, see `schema faults`)."),
]
PolicyName = Annotated[
    str | None,
    typer.Option("--policy", help="Re-plan while serving: never, every-n, drift or net-benefit."),
]
EverySteps = Annotated[
    int,
    typer.Option(help="Steps between looks for a better plan, with --policy.",
                 callback=whole("--every-steps", 1)),
]


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
        raise UsageError(f"--overlap {name!r}: none, two_batch or pipeline")
    return None if name == "none" else Overlap(name)  # type: ignore[arg-type]


def build_serving(
    step_tokens: int, max_requests: int | None, prefill: str, kv_bytes_per_token: float | None,
    other_bytes: int | None, groups: int, overlap: str, other_us_per_token: float,
) -> Serving:
    """How the service runs."""
    from ..simulator.pricing.memory import MemorySpec
    from ..simulator.serving.batching import BatchLimits
    from ..simulator.serving.simulate import Serving

    if other_bytes is not None and kv_bytes_per_token is None:
        raise UsageError("--other-bytes counts only with --kv-bytes-per-token: name both")
    in_flight = min(MOST_IN_FLIGHT, step_tokens) if max_requests is None else max_requests
    return Serving(
        BatchLimits(step_tokens, in_flight, prefill=prefill),  # type: ignore[arg-type]
        None if kv_bytes_per_token is None else MemorySpec(kv_bytes_per_token, other_bytes or 0),
        groups, build_overlap(overlap), other_us_per_token,
    )


def build_happenings(
    faults: Path | None, policy: str | None, every_steps: int, cluster: Cluster, groups: int
) -> list[Happening]:
    """The faults of the file, and the policy at work on every serving group."""
    from ..placement.rebalancing.policy import Policy
    from ..simulator.events.fault_file import read_faults
    from ..simulator.events.replan import Replanning

    found: list[Happening] = [] if faults is None else [*read_faults(faults, cluster, groups)]
    if policy is not None:
        name = policy.replace("-", "_")      # as `run --control` spells it
        rule = Policy(name, every_steps=every_steps)  # type: ignore[arg-type]
        window = min(Replanning(rule).window_steps, every_steps)
        found += [Replanning(rule, window_steps=window, group=g) for g in range(groups)]
    return found
