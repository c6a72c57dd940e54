"""Arrivals: when requests come and how long they are, and processes that make them.

Knows times and token counts. Knows nothing of what requests say, of routing or of how they are
served. Files: `arrival_files.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from ..errors import InputError, UsageError
from ..foundation.arrays import IntArray


@dataclass(frozen=True)
class Length:
    """Tokens of a prompt or an answer: lognormal with this mean and spread, at least 1."""

    mean: float
    cv: float = 0.0   # standard deviation over mean; 0: always the same

    def __post_init__(self) -> None:
        if self.mean < 1 or self.cv < 0:
            raise UsageError(f"a length needs mean >= 1 and cv >= 0; got {self.mean}, {self.cv}")

    def sample(self, rng: np.random.Generator, count: int) -> IntArray:
        """[count] token counts; the rounding keeps the mean to within half a token."""
        if self.cv == 0:
            return np.full(count, max(1, round(self.mean)), np.int64)
        sigma2 = np.log1p(self.cv**2)
        drawn = rng.lognormal(np.log(self.mean) - sigma2 / 2, np.sqrt(sigma2), count)
        return np.maximum(1, np.rint(drawn)).astype(np.int64)


@dataclass(frozen=True)
class Arrivals:
    """R requests in the order they come; times start near 0."""

    time_us: IntArray          # [R] not falling
    prompt_tokens: IntArray    # [R]
    output_tokens: IntArray    # [R]
    source: str = ""
    notes: tuple[str, ...] = ()    # what was read, and how

    def __post_init__(self) -> None:
        shapes = {len(self.time_us), len(self.prompt_tokens), len(self.output_tokens)}
        if len(shapes) != 1 or len(self.time_us) == 0:
            raise InputError(
                f"{self.source or 'arrivals'}: need at least one request and equally many times, "
                f"prompt and output lengths; got {sorted(shapes)}"
            )
        for name in ("time_us", "prompt_tokens", "output_tokens"):
            column = getattr(self, name)
            if (column < 0).any():
                row = int(np.argmax(column < 0))
                raise InputError(
                    f"{self.source or 'arrivals'}: {name} of request {row} is {column[row]}, "
                    "must be >= 0"
                )
        falling = np.flatnonzero(np.diff(self.time_us) < 0)
        if len(falling):
            row = int(falling[0]) + 1
            raise InputError(
                f"{self.source or 'arrivals'}: time_us of request {row} is before that of request "
                f"{row - 1}: sort the requests by time"
            )

    def __len__(self) -> int:
        return len(self.time_us)

    @property
    def rate_per_s(self) -> float:
        """Requests per second between the first and the last; 0 where all come at once."""
        span_us = int(self.time_us[-1] - self.time_us[0])
        return (len(self) - 1) * 1e6 / span_us if span_us else 0.0

    def scaled(self, factor: float) -> Self:
        """The same requests at `factor` times the rate."""
        if not (np.isfinite(factor) and factor > 0):
            raise UsageError(f"a rate can be scaled by a positive factor only; got {factor}")
        return type(self)(
            np.rint(self.time_us / factor).astype(np.int64), self.prompt_tokens,
            self.output_tokens, f"{self.source} x {factor:g}",
        )


def gamma(
    requests: int, rate_per_s: float, *, cv: float = 1.0, prompt: Length = Length(1024, 1.0),
    output: Length = Length(128, 1.0), seed: int = 0,
) -> Arrivals:
    """Independent gaps with mean 1 / rate and coefficient of variation `cv`; 0 is a metronome.

    Gaps, prompts and outputs come from three streams of the seed: another length distribution
    leaves the times alone.
    """
    sound = np.isfinite([rate_per_s, cv]).all()
    if requests < 1 or not sound or rate_per_s <= 0 or cv < 0:
        raise UsageError(
            "need requests >= 1, rate_per_s > 0, cv >= 0, both finite; got "
            f"{requests}, {rate_per_s}, {cv}"
        )
    gaps, prompts, outputs = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)
    )
    mean_us = 1e6 / rate_per_s
    if cv == 0:
        gap_us = np.full(requests, mean_us)
    else:
        gap_us = gaps.gamma(1 / cv**2, mean_us * cv**2, requests)
    return Arrivals(
        np.rint(np.cumsum(gap_us)).astype(np.int64), prompt.sample(prompts, requests),
        output.sample(outputs, requests), f"gamma {rate_per_s:g}/s cv {cv:g}",
    )


def poisson_times_us(requests: int, rate_per_s: float, seed: int) -> IntArray:
    """[R] the times of a Poisson process, as `poisson` draws them."""
    return poisson(requests, rate_per_s, seed=seed).time_us


def poisson(
    requests: int, rate_per_s: float, *, prompt: Length = Length(1024, 1.0),
    output: Length = Length(128, 1.0), seed: int = 0,
) -> Arrivals:
    """A Poisson process: gamma gaps with cv 1."""
    return gamma(requests, rate_per_s, cv=1.0, prompt=prompt, output=output, seed=seed)
