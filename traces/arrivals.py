"""Arrivals: when requests come and how long they are.

From a process (Poisson, gamma) or from a file (Azure's CSV, Mooncake's JSONL). Knows times and
token counts. Knows nothing of what requests say, of routing or of how they are served.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import InputError, UsageError
from ..foundation.arrays import IntArray
from ..foundation.documents import parse_json

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")
_NOT_A_TIME = int(np.iinfo(np.int64).min)
_MOST = 10**15                # of milliseconds: 30,000 years
_SUFFIXES = {".csv": "azure", ".jsonl": "mooncake"}


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


def poisson(
    requests: int, rate_per_s: float, *, prompt: Length = Length(1024, 1.0),
    output: Length = Length(128, 1.0), seed: int = 0,
) -> Arrivals:
    """A Poisson process: gamma gaps with cv 1."""
    return gamma(requests, rate_per_s, cv=1.0, prompt=prompt, output=output, seed=seed)


def load_arrivals(path: Path | str) -> Arrivals:
    """Arrivals of a file by its suffix: .csv is Azure's format, .jsonl Mooncake's.

    Times are shifted so that the first request comes at 0.
    Raises InputError naming the row (1 is the first request) and the field.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"{path}: arrivals are read from .csv (Azure: {', '.join(_AZURE)}) or .jsonl "
            f"(Mooncake: {', '.join(_MOONCAKE)})"
        )
    try:
        if _SUFFIXES[path.suffix] == "azure":
            rows = list(_azure_rows(path))
        else:
            rows = list(_mooncake_rows(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not rows:
        raise InputError(f"{path}: holds no request")
    columns = np.array(rows, np.int64)
    _refuse_falling(path, columns[:, 0])
    return Arrivals(columns[:, 0] - columns[0, 0], columns[:, 1], columns[:, 2], path.name)


def _azure_rows(path: Path) -> Iterator[tuple[int, int, int]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _AZURE if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{path}: the header lacks {', '.join(missing)} of Azure's format")
        for number, row in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            yield (
                _timestamp_us(row["TIMESTAMP"], where),
                _count(row["ContextTokens"], f"{where}: ContextTokens"),
                _count(row["GeneratedTokens"], f"{where}: GeneratedTokens"),
            )


def _mooncake_rows(path: Path) -> Iterator[tuple[int, int, int]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            row = parse_json(line, where, finite=False)     # fields are checked below
            missing = [n for n in _MOONCAKE if not isinstance(row, dict) or n not in row]
            if missing:
                raise InputError(f"{where}: lacks {', '.join(missing)}")
            yield (
                1000 * _count(row["timestamp"], f"{where}: timestamp"),
                _count(row["input_length"], f"{where}: input_length"),
                _count(row["output_length"], f"{where}: output_length"),
            )


def _timestamp_us(text: str | None, where: str) -> int:
    """Microseconds since 1970; a UTC offset of zero may follow, as in Azure's later files."""
    plain = (text or "").strip().removesuffix("Z").removesuffix("+00:00")
    try:
        nanoseconds = int(np.datetime64(plain, "ns").astype(np.int64))
    except ValueError:
        nanoseconds = _NOT_A_TIME
    if nanoseconds == _NOT_A_TIME:  # also what an empty field turns into
        raise InputError(f"{where}: TIMESTAMP {text!r} is not a date and time")
    return nanoseconds // 1000


def _count(value: Any, where: str) -> int:
    """A whole number >= 0, from text or JSON."""
    try:
        number = int(value) if isinstance(value, str) else value
        if isinstance(number, bool) or number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} {repr(value)[:40]} is not a whole number") from None
    if number < 0:
        raise InputError(f"{where} is {value}, must be >= 0")
    if number > _MOST:
        raise InputError(f"{where} is beyond {_MOST:,}: correct it")
    return int(number)


def _refuse_falling(path: Path, time_us: IntArray) -> None:
    falling = np.flatnonzero(np.diff(time_us) < 0)
    if len(falling):
        row = int(falling[0]) + 2
        raise InputError(
            f"{path}, row {row}: the timestamp is before that of row {row - 1}: sort the file by "
            "time"
        )
