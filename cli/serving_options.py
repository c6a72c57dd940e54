"""Options that say how a simulated service runs and what befalls it, and what they build."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError

MOST_REQUESTS, MOST_TOKENS = 10_000_000, 10_000_000


def within(option: str, low: float, high: float = math.inf) -> Callable[[float], float]:
    """A check of one option's number: finite, from `low` to `high`; None passes."""
    def check(value: float) -> float:
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            reach = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:,.0f}"
            raise UsageError(f"{option} {value:g} must be a finite number, {reach}")
        return value

    return check


def above_zero(option: str) -> Callable[[float], float]:
    """A check of one option's number: finite and above 0; None passes."""
    def check(value: float) -> float:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{option} {value:g} must be a finite number above 0")
        return value

    return check


def whole(option: str, low: int, high: int | None = None) -> Callable[[int], int]:
    """A check of one option's whole number: from `low` to `high`; None passes."""
    def check(value: int) -> int:
        if value is not None and not low <= value <= (value if high is None else high):
            reach = f"at least {low}" if high is None else f"{low} to {high:,}"
            raise UsageError(f"{option} {value} must be {reach}")
        return value

    return check


ArrivalsFile = Annotated[
    Path | None,
    typer.Option("--arrivals", help="Azure, BurstGPT, Bailian, Mooncake or vidur trace (.csv, "
                 ".jsonl), or lengths alone, ShareGPT's too [default: Poisson]."),
]
ArrivalsUnit = Annotated[
    str | None,
    typer.Option(help="Unit of the file's times: s, ms or us [default: its form's own]."),
]
Requests = Annotated[
    int,
    typer.Option(help="Requests, at most.", callback=whole("--requests", 1, MOST_REQUESTS)),
]
Rate = Annotated[
    float, typer.Option(help="Poisson arrivals per second.", callback=above_zero("--rate"))
]
PromptTokens = Annotated[
    float,
    typer.Option(
        help="Mean prompt length (Poisson).", callback=within("--prompt-tokens", 1, MOST_TOKENS)
    ),
]
OutputTokens = Annotated[
    float,
    typer.Option(
        help="Mean output length (Poisson).", callback=within("--output-tokens", 1, MOST_TOKENS)
    ),
]
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
    str, typer.Option(help="chunked: together with decoding requests; first: prompts run alone.")
]
KvBytesPerToken = Annotated[
    float | None,
    typer.Option(help="KV cache of a token, all layers [default: memory is no limit].",
                 callback=above_zero("--kv-bytes-per-token")),
]
OtherBytes = Annotated[
    int | None,
    typer.Option(help="Weights other than experts on each device, with --kv-bytes-per-token "
                 "[default: the model's].",
                 callback=whole("--other-bytes", 0)),
]
Groups = Annotated[
    int, typer.Option(help="Equal clusters behind one queue.", callback=whole("--groups", 1, 64))
]
OverlapName = Annotated[
    str,
    typer.Option("--overlap", help="How exchange overlaps compute: none, two_batch or pipeline."),
]
OtherUsPerToken = Annotated[
    float,
    typer.Option(help="Attention and dense layers: microseconds per token of a device.",
                 callback=within("--other-us-per-token", 0, 1e6)),
]
FaultsPath = Annotated[
    Path | None,
    typer.Option("--faults", help="What goes wrong (YAML or JSON): `loadmaster example faults` has "
                 "one."),
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
