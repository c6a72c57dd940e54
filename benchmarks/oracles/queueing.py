"""Queues whose answer is known, played through the serving loop itself.

A request is one token, a step serves one request, a serving group is one server: then the loop is
an M/G/k queue and must agree with the formulas (long run) and with Lindley's and Kiefer and
Wolfowitz's recursions (request by request). Knows nothing of plans or devices.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loadmaster.foundation.arrays import IntArray
from loadmaster.simulator.random_streams import stream
from loadmaster.simulator.serving.batching import Batch, BatchLimits
from loadmaster.simulator.serving.event_loop import ServingGroup, ServingLoop
from loadmaster.simulator.serving.workload import Workload

Service = Literal["exponential", "deterministic", "lognormal"]

MEAN_SERVICE_NS = 1_000_000
LOGNORMAL_SIGMA = 0.8


@dataclass(frozen=True)
class Queue:
    """A single-queue station: `servers` servers, offered `load` per server in (0, 1)."""

    service: Service
    servers: int = 1
    load: float = 0.5

    @property
    def name(self) -> str:
        letter = {"exponential": "M", "deterministic": "D", "lognormal": "G"}[self.service]
        return f"M/{letter}/{self.servers}"

    def mean_wait_ns(self) -> float:
        """The long-run mean wait: Pollaczek-Khinchine for one server, Erlang C for several.

        Several servers are answered for exponential service only; raises ValueError otherwise.
        """
        if self.servers == 1:
            variation = {
                "exponential": 1.0, "deterministic": 0.0,
                "lognormal": math.expm1(LOGNORMAL_SIGMA**2),
            }[self.service]
            rho = self.load
            return MEAN_SERVICE_NS * rho / (1 - rho) * (1 + variation) / 2
        if self.service != "exponential":
            raise ValueError(f"no closed form for {self.name}")
        k, offered = self.servers, self.servers * self.load
        last = offered**k / math.factorial(k) / (1 - self.load)
        busy = last / (sum(offered**n / math.factorial(n) for n in range(k)) + last)
        return busy * MEAN_SERVICE_NS / (k * (1 - self.load))

    def draw(self, requests: int, seed: int) -> tuple[IntArray, IntArray]:
        """(arrival_ns, service_ns) [R], from the streams "arrivals" and "service" of the seed."""
        gap_ns = MEAN_SERVICE_NS / (self.load * self.servers)
        gaps = stream(seed, "arrivals").exponential(gap_ns, requests)
        arrival_ns = np.cumsum(np.rint(gaps).astype(np.int64))
        rng = stream(seed, "service")
        if self.service == "deterministic":
            service = np.full(requests, float(MEAN_SERVICE_NS))
        elif self.service == "exponential":
            service = rng.exponential(MEAN_SERVICE_NS, requests)
        else:
            mean_log = math.log(MEAN_SERVICE_NS) - LOGNORMAL_SIGMA**2 / 2
            service = rng.lognormal(mean_log, LOGNORMAL_SIGMA, requests)
        return arrival_ns, np.maximum(1, np.rint(service)).astype(np.int64)


@dataclass(frozen=True)
class ServiceTimes:
    """A step timer for steps of one request: each request's own service time."""

    service_ns: list[int]

    def step_ns(self, batch: Batch, group: ServingGroup) -> int:
        return self.service_ns[batch.chunks[0].prefill.request]


def waits_of_loop(arrival_ns: IntArray, service_ns: IntArray, servers: int = 1) -> IntArray:
    """[R] nanoseconds between arrival and start, through the serving loop."""
    ones = np.ones(len(arrival_ns), np.int64)
    workload = Workload(arrival_ns, ones, ones)
    limits = BatchLimits(step_tokens=1, max_requests=1)
    loop = ServingLoop(workload, ServiceTimes(service_ns.tolist()), limits, groups=servers)
    loop.run()
    return np.asarray(loop.requests.start_ns, np.int64) - arrival_ns


def waits_by_recursion(arrival_ns: IntArray, service_ns: IntArray, servers: int = 1) -> IntArray:
    """[R] the same, request by request: each starts when the first of the servers is free."""
    free_ns = [0] * servers
    waits = np.empty(len(arrival_ns), np.int64)
    for r, (arrival, service) in enumerate(
        zip(arrival_ns.tolist(), service_ns.tolist(), strict=True)
    ):
        start = max(arrival, free_ns[0])
        heapq.heapreplace(free_ns, start + service)
        waits[r] = start - arrival
    return waits
