"""SimulationResult: what the users of a simulated service saw, and what the devices did.

Knows finished runs. Knows nothing of how they came about. Wall time appears nowhere, so equal
inputs give equal bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...foundation.arrays import FloatArray, IntArray
from ..pricing.attribution import Blame
from ..pricing.step_composition import Composition
from .workload import Workload


@dataclass(frozen=True)
class Slo:
    """What a request must meet to count as good: first token, and mean time per further token."""

    ttft_us: float
    tpot_us: float

    def __post_init__(self) -> None:
        if not (self.ttft_us > 0 and self.tpot_us > 0):
            raise UsageError(f"slo: ttft_us {self.ttft_us} and tpot_us {self.tpot_us} must be > 0")


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles in microseconds, over `count` requests."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    worst: float

    @classmethod
    def of(cls, values_us: FloatArray) -> Distribution | None:
        """None where there is nothing to describe (no request wrote a second token, say)."""
        if not len(values_us):
            return None
        p50, p90, p95, p99 = (float(q) for q in np.quantile(values_us, (0.5, 0.9, 0.95, 0.99)))
        return cls(len(values_us), float(values_us.mean()), p50, p90, p95, p99,
                   float(values_us.max()))


@dataclass(frozen=True, eq=False)
class RequestTimes:
    """[R] nanoseconds of each request; `retries` = how often a lost device sent it back."""

    arrival_ns: IntArray
    start_ns: IntArray
    first_token_ns: IntArray
    finish_ns: IntArray
    output_tokens: IntArray
    retries: IntArray

    @property
    def wait_us(self) -> FloatArray:
        """Arrival until its first token is in a step."""
        return (self.start_ns - self.arrival_ns) / 1e3

    @property
    def ttft_us(self) -> FloatArray:
        """Arrival until the first answer token exists."""
        return (self.first_token_ns - self.arrival_ns) / 1e3

    @property
    def latency_us(self) -> FloatArray:
        """Arrival until the last answer token exists."""
        return (self.finish_ns - self.arrival_ns) / 1e3

    @property
    def tpot_us(self) -> FloatArray:
        """Mean time of each further token; only requests that wrote more than one."""
        several = self.output_tokens > 1
        decode_ns = (self.finish_ns - self.first_token_ns)[several]
        return decode_ns / (self.output_tokens[several] - 1) / 1e3

    def good_R(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """[R] whether the request met both limits."""
        further = np.maximum(self.output_tokens - 1, 1)
        tpot_us = (self.finish_ns - self.first_token_ns) / further / 1e3
        good: npt.NDArray[np.bool_] = (self.ttft_us <= slo.ttft_us) & (tpot_us <= slo.tpot_us)
        return good


@dataclass(frozen=True)
class Event:
    """Something that happened between steps: a switch, a fault, a recovery."""

    at_us: float
    kind: str
    detail: str
    pause_us: float = 0.0


@dataclass(frozen=True, eq=False)
class StepTimes:
    """[W] steps in the order they ended: nanoseconds, tokens, serving group, epoch."""

    start_ns: IntArray
    duration_ns: IntArray
    prefill_tokens: IntArray
    decode_tokens: IntArray
    group: IntArray
    epoch: IntArray

    def __len__(self) -> int:
        return len(self.start_ns)


@dataclass(frozen=True, eq=False)
class SimulationResult:
    """One served workload under one plan (and what replaced it on the way)."""

    requests: RequestTimes
    steps: StepTimes
    duration_us: float                  # first arrival's clock zero to the last answer
    ttft: Distribution
    latency: Distribution
    wait: Distribution
    tpot: Distribution | None
    step_time: Distribution
    device_busy_G: FloatArray           # share of the duration spent in experts, all groups' mean
    port_busy_PG: FloatArray            # [4, G] share: nvlink out, in, nic out, in
    blame: Blame
    goodput_requests_per_s: float | None
    slo: Slo | None
    events: tuple[Event, ...] = ()
    paused_us: float = 0.0
    moved_bytes: int = 0
    lost_steps: int = 0
    seed: int = 0
    notes: tuple[str, ...] = ()
    first_steps: tuple[Composition, ...] = ()     # what the first steps held

    @property
    def requests_per_s(self) -> float:
        """Answered requests over the whole duration."""
        return len(self.requests.finish_ns) / (self.duration_us / 1e6)

    @property
    def output_tokens_per_s(self) -> float:
        """Written tokens over the whole duration."""
        return float(self.requests.output_tokens.sum()) / (self.duration_us / 1e6)

    def to_dict(self) -> dict[str, Any]:
        """Summary figures, ready for JSON; arrays per request and step stay out."""
        ports = ("nvlink_out", "nvlink_in", "nic_out", "nic_in")
        return {
            "requests": len(self.requests.finish_ns),
            "steps": len(self.steps),
            "duration_us": self.duration_us,
            "requests_per_s": self.requests_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "goodput_requests_per_s": self.goodput_requests_per_s,
            "slo": None if self.slo is None else vars(self.slo),
            "ttft_us": vars(self.ttft),
            "tpot_us": None if self.tpot is None else vars(self.tpot),
            "latency_us": vars(self.latency),
            "wait_us": vars(self.wait),
            "step_us": vars(self.step_time),
            "device_busy": [round(float(b), 6) for b in self.device_busy_G],
            "port_busy": {
                name: [round(float(b), 6) for b in row]
                for name, row in zip(ports, self.port_busy_PG, strict=True)
            },
            "blame": self.blame.to_dict(),
            "events": [vars(e) for e in self.events],
            "paused_us": self.paused_us,
            "moved_bytes": self.moved_bytes,
            "lost_steps": self.lost_steps,
            "retried_requests": int((self.requests.retries > 0).sum()),
            "seed": self.seed,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The summary as one line; equal runs give equal bytes."""
        return json.dumps(self.to_dict(), separators=(",", ":")) + "\n"


def request_times(workload: Workload, log: Any) -> RequestTimes:
    """Arrays out of the loop's `RequestLog`."""
    columns = (log.start_ns, log.first_token_ns, log.finish_ns)
    start, first, finish = (np.array(c, np.int64) for c in columns)
    return RequestTimes(workload.arrival_ns, start, first, finish, workload.output_tokens,
                        np.array(log.retries, np.int64))
