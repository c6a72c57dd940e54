"""Workload: which requests arrive when, how long they are, and what they are about.

Knows arrival times (integer nanoseconds), token counts and domains. Knows nothing of plans, steps
or devices; files and arrival processes are `traces/arrivals.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.arrays import IntArray
from ..random_streams import stream

NS_PER_US = 1_000
LATEST_US = 9e15    # of 64-bit nanoseconds


class ArrivalsLike(Protocol):
    """What `traces/arrivals.py` hands over: one entry per request."""

    @property
    def time_us(self) -> npt.NDArray[Any]: ...
    @property
    def prompt_tokens(self) -> npt.NDArray[Any]: ...
    @property
    def output_tokens(self) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class Workload:
    """R requests in the order they arrive.

    arrival_ns, prompt_tokens, output_tokens [R] int64; `domain` [R] indexes `domain_names`, None
    where all requests draw from the whole trace. Raises InputError naming the field and the first
    bad request: arrivals not negative and not falling, at least one token read and one written.
    """

    arrival_ns: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    domain: IntArray | None = None
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        arrival_ns = np.asarray(self.arrival_ns)
        if arrival_ns.ndim != 1 or not len(arrival_ns) or arrival_ns.dtype.kind not in "iu":
            raise InputError(
                "arrival_ns must list at least one request in whole nanoseconds; got "
                f"{arrival_ns.dtype} {list(arrival_ns.shape)}"
            )
        _refuse_times("arrival_ns", arrival_ns)
        object.__setattr__(self, "arrival_ns", arrival_ns.astype(np.int64, copy=False))
        for name in ("prompt_tokens", "output_tokens"):
            counts = _token_counts(name, getattr(self, name), len(arrival_ns))
            object.__setattr__(self, name, counts)
        if self.domain is not None:
            domain_R = _domains(self.domain, len(arrival_ns), len(self.domain_names))
            object.__setattr__(self, "domain", domain_R)

    @classmethod
    def from_arrays(
        cls,
        arrival_us: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike,
        *,
        domain: npt.ArrayLike | None = None,
        domain_names: Sequence[str] = (),
    ) -> Self:
        """Check everything once. Raises InputError naming the field and the first bad request.

        arrival_us: microseconds from the start, not negative, not falling. A request has at least
        one prompt token and one output token.
        """
        time_us = np.asarray(arrival_us, np.float64)
        if time_us.ndim != 1 or not len(time_us):
            raise InputError(f"arrival_us must list at least one request; got {time_us.shape}")
        _refuse("arrival_us", time_us, ~np.isfinite(time_us), "is not a finite number")
        _refuse_times("arrival_us", time_us)
        _refuse("arrival_us", time_us, time_us > LATEST_US, "is later than the clock can tell")
        arrival_ns = np.rint(time_us * NS_PER_US).astype(np.int64)
        return cls(
            arrival_ns, np.asarray(prompt_tokens), np.asarray(output_tokens),
            domain=None if domain is None else np.asarray(domain), domain_names=tuple(domain_names),
        )

    @classmethod
    def from_arrivals(cls, arrivals: ArrivalsLike) -> Self:
        """From an arrival file or process of `traces/`; a length of 0 is served as one token."""
        return cls.from_arrays(
            arrivals.time_us, np.maximum(arrivals.prompt_tokens, 1),
            np.maximum(arrivals.output_tokens, 1),
        )

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def duration_ns(self) -> int:
        """From the clock's zero to the last arrival."""
        return int(self.arrival_ns[-1])

    def head(self, requests: int) -> Self:
        """The first requests only, at least 1. Raises InputError."""
        if requests < 1:
            raise InputError(f"head: {requests} requests: keep at least 1")
        return self._take(slice(0, requests))

    def until(self, time_us: float) -> Self:
        """Requests that arrive before `time_us`. Raises InputError when none does."""
        if not np.isfinite(time_us):
            raise InputError(f"until: {time_us} us is not a finite time")
        kept = int(np.searchsorted(self.arrival_ns, round(time_us * NS_PER_US)))
        if kept == 0:
            raise InputError(f"no request arrives before {time_us} us")
        return self.head(kept)

    def scaled(self, rate: float) -> Self:
        """The same requests `rate` times as fast."""
        if not (np.isfinite(rate) and rate > 0):
            raise InputError(f"rate {rate} must be finite and above 0")
        if self.duration_ns / rate > LATEST_US * NS_PER_US:
            raise InputError(f"rate {rate}: requests would come later than the clock tells")
        arrival_ns = np.rint(self.arrival_ns / rate).astype(np.int64)
        return dataclasses.replace(self, arrival_ns=arrival_ns)

    def with_burst(
        self, from_us: float, until_us: float, times: int, *, seed: int = 0
    ) -> Self:
        """Requests of a window come `times` as often: replicas at random moments inside it.

        Times from the stream "burst" of `seed`. Raises InputError when the window holds none.
        """
        if not np.isfinite([from_us, until_us]).all():
            raise InputError(f"burst: {from_us}..{until_us} us must be finite times")
        first, last = np.searchsorted(self.arrival_ns, [from_us * NS_PER_US, until_us * NS_PER_US])
        if times < 2 or last <= first:
            raise InputError(
                f"burst: times {times} must be at least 2 and {from_us}..{until_us} us must hold "
                "a request"
            )
        copied = np.repeat(np.arange(first, last), times - 1)
        at_us = stream(seed, "burst").uniform(from_us, until_us, len(copied))
        arrival_ns = np.concatenate([self.arrival_ns, np.rint(at_us * NS_PER_US).astype(np.int64)])
        source = np.concatenate([np.arange(len(self)), copied])
        order = np.argsort(arrival_ns, kind="stable")
        return self._take(source[order], arrival_ns[order])

    def with_domains(
        self,
        names: Sequence[str],
        shares: Sequence[tuple[float, Sequence[float]]],
        *,
        seed: int = 0,
    ) -> Self:
        """Give every request a domain; the mix may change over time.

        shares: (from_us, [share of each name]) in rising order; a mix holds until the next one.
        Drawn from the stream "domains" of `seed`, one number per request, so the same request
        keeps its domain under every plan.
        """
        starts = np.array([start for start, _ in shares], np.float64)
        mix = np.array([list(m) for _, m in shares], np.float64)
        if not len(starts) or mix.shape != (len(starts), len(names)) or (np.diff(starts) < 0).any():
            raise InputError(
                f"shares must list (from_us, {len(names)} shares) in rising order of from_us"
            )
        if not np.isfinite(starts).all() or not np.isfinite(mix).all():
            raise InputError("shares must be finite, and so must the times they hold from")
        if (mix < 0).any() or (mix.sum(axis=1) <= 0).any():
            raise InputError("shares must be >= 0 and not all zero")
        phase_R = np.searchsorted(starts * NS_PER_US, self.arrival_ns, side="right") - 1
        cumulative = np.cumsum(mix, axis=1) / mix.sum(axis=1, keepdims=True)
        draw_R = stream(seed, "domains").random(len(self))
        domain_R = (draw_R[:, None] >= cumulative[np.maximum(phase_R, 0)]).sum(axis=1)
        domain_R = np.minimum(domain_R, len(names) - 1).astype(np.int64)
        return dataclasses.replace(self, domain=domain_R, domain_names=tuple(names))

    def _take(self, part: slice | IntArray, arrival_ns: IntArray | None = None) -> Self:
        """Some of the requests, at their own times or at others."""
        return dataclasses.replace(
            self,
            arrival_ns=self.arrival_ns[part] if arrival_ns is None else arrival_ns,
            prompt_tokens=self.prompt_tokens[part],
            output_tokens=self.output_tokens[part],
            domain=None if self.domain is None else self.domain[part],
        )


def as_workload(source: Workload | ArrivalsLike) -> Workload:
    """A workload as it is; arrivals turned into one."""
    return source if isinstance(source, Workload) else Workload.from_arrivals(source)


def _refuse_times(name: str, times: npt.NDArray[Any]) -> None:
    _refuse(name, times, times < 0, "is negative: count from the first request")
    falling = np.concatenate(([False], times[1:] < times[:-1]))
    _refuse(name, times, falling, "is before the request above: sort by arrival")


def _domains(domain: npt.ArrayLike, requests: int, names: int) -> IntArray:
    domain_R = np.asarray(domain)
    if domain_R.shape != (requests,):
        raise InputError(f"domain lists {domain_R.size} requests, the arrivals {requests}")
    if domain_R.dtype.kind not in "iu":
        raise InputError(f"domain must be whole numbers; got {domain_R.dtype}")
    outside = (domain_R < 0) | (domain_R >= names)
    _refuse("domain", domain_R, outside, f"is not among {names} domain_names")
    return domain_R.astype(np.int64, copy=False)


def _token_counts(name: str, values: npt.ArrayLike, requests: int) -> IntArray:
    counts = np.asarray(values)
    if counts.shape != (requests,):
        raise InputError(f"{name} lists {counts.size} requests, the arrivals {requests}")
    if counts.dtype.kind not in "iu":
        raise InputError(f"{name} must be whole numbers; got {counts.dtype}")
    _refuse(name, counts, counts < 1, "is below 1: a request reads and writes at least one token")
    return counts.astype(np.int64, copy=False)


def _refuse(
    name: str, values: npt.NDArray[Any], bad: npt.NDArray[np.bool_], why: str
) -> None:
    if bad.any():
        request = int(np.argmax(bad))
        raise InputError(f"{name}: request {request}: {values[request]} {why}")
