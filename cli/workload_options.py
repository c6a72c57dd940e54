"""Options that say which requests arrive, and the workload they build."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..simulator.serving.workload import Workload

MOST_REQUESTS, MOST_TOKENS = 10_000_000, 10_000_000
LONGEST_S = 1e9              # from the first Poisson arrival to the last


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
    Path | None, typer.Option("--arrivals", help="Azure .csv or Mooncake .jsonl [default: Poisson]")
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


def build_workload(
    arrivals: Path | None, requests: int, rate: float, prompt_tokens: float, output_tokens: float,
    seed: int,
) -> Workload:
    """The file's first requests, or a Poisson process."""
    from ..simulator.serving.workload import as_workload
    from ..traces.arrivals import Length, load_arrivals, poisson

    if arrivals is not None:
        return as_workload(load_arrivals(arrivals)).head(requests)
    if requests / rate > LONGEST_S:
        raise UsageError(
            f"--rate {rate:g}: {requests} requests would take {requests / rate:.3g} s to arrive, "
            f"at most {LONGEST_S:.0e} s are played: raise the rate"
        )
    return as_workload(poisson(
        requests, rate, prompt=Length(prompt_tokens, 1.0), output=Length(output_tokens, 1.0),
        seed=seed,
    ))
