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

from ..errors import InputError
from .streams import stream

IntArray = npt.NDArray[np.int64]

NS_PER_US = 1_000


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
    where all requests draw from the whole trace.
    """

    arrival_ns: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    domain: IntArray | None = None
    domain_names: tuple[str, ...] = ()

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
        _refuse("arrival_us", time_us, time_us < 0, "is negative: count from the first request")
        falling = np.concatenate(([False], np.diff(time_us) < 0))
        _refuse("arrival_us", time_us, falling, "is before the request above: sort by arrival")
        columns = {
            "prompt_tokens": _token_counts("prompt_tokens", prompt_tokens, len(time_us)),
            "output_tokens": _token_counts("output_tokens", output_tokens, len(time_us)),
        }
        names = tuple(domain_names)
        domain_R = None
        if domain is not None:
            domain_R = np.asarray(domain).astype(np.int64)
            if domain_R.shape != time_us.shape:
                raise InputError(
                    f"domain lists {domain_R.size} requests, arrival_us {time_us.size}"
                )
            outside = (domain_R < 0) | (domain_R >= len(names))
            _refuse("domain", domain_R, outside, f"is not among {len(names)} domain_names")
        arrival_ns = np.rint(time_us * NS_PER_US).astype(np.int64)
        return cls(arrival_ns, **columns, domain=domain_R, domain_names=names)

    @classmethod
    def from_arrivals(cls, arrivals: ArrivalsLike) -> Self:
        """From an arrival file or process of `traces/arrivals.py`."""
        return cls.from_arrays(arrivals.time_us, arrivals.prompt_tokens, arrivals.output_tokens)

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def duration_ns(self) -> int:
        """From the clock's zero to the last arrival."""
        return int(self.arrival_ns[-1])

    def head(self, requests: int) -> Self:
        """The first requests only."""
        return self._take(slice(0, requests))

    def until(self, time_us: float) -> Self:
        """Requests that arrive before `time_us`. Raises InputError when none does."""
        kept = int(np.searchsorted(self.arrival_ns, round(time_us * NS_PER_US)))
        if kept == 0:
            raise InputError(f"no request arrives before {time_us} us")
        return self.head(kept)

    def scaled(self, rate: float) -> Self:
        """The same requests `rate` times as fast."""
        if not (np.isfinite(rate) and rate > 0):
            raise InputError(f"rate {rate} must be finite and above 0")
        arrival_ns = np.rint(self.arrival_ns / rate).astype(np.int64)
        return dataclasses.replace(self, arrival_ns=arrival_ns)

    def with_burst(
        self, from_us: float, until_us: float, times: int, *, seed: int = 0
    ) -> Self:
        """Requests of a window come `times` as often: copies at random moments inside it.

        Times from the stream "burst" of `seed`. Raises InputError when the window holds none.
        """
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
        return dataclasses.replace(
            self._take(source[order]), arrival_ns=arrival_ns[order]
        )

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
        if (mix < 0).any() or (mix.sum(axis=1) <= 0).any():
            raise InputError("shares must be >= 0 and not all zero")
        phase_R = np.searchsorted(starts * NS_PER_US, self.arrival_ns, side="right") - 1
        cumulative = np.cumsum(mix, axis=1) / mix.sum(axis=1, keepdims=True)
        draw_R = stream(seed, "domains").random(len(self))
        domain_R = (draw_R[:, None] >= cumulative[np.maximum(phase_R, 0)]).sum(axis=1)
        domain_R = np.minimum(domain_R, len(names) - 1).astype(np.int64)
        return dataclasses.replace(self, domain=domain_R, domain_names=tuple(names))

    def _take(self, part: slice | IntArray) -> Self:
        return dataclasses.replace(
            self,
            arrival_ns=self.arrival_ns[part],
            prompt_tokens=self.prompt_tokens[part],
            output_tokens=self.output_tokens[part],
            domain=None if self.domain is None else self.domain[part],
        )


def as_workload(source: Workload | ArrivalsLike) -> Workload:
    """A workload as it is; arrivals turned into one."""
    return source if isinstance(source, Workload) else Workload.from_arrivals(source)


def _token_counts(name: str, values: npt.ArrayLike, requests: int) -> IntArray:
    counts = np.asarray(values)
    if counts.shape != (requests,):
        raise InputError(f"{name} lists {counts.size} requests, arrival_us {requests}")
    if counts.dtype.kind not in "iu":
        raise InputError(f"{name} must be whole numbers; got {counts.dtype}")
    _refuse(name, counts, counts < 1, "is below 1: a request reads and writes at least one token")
    return counts.astype(np.int64)


def _refuse(
    name: str, values: npt.NDArray[Any], bad: npt.NDArray[np.bool_], why: str
) -> None:
    if bad.any():
        request = int(np.argmax(bad))
        raise InputError(f"{name}: request {request}: {values[request]} {why}")
