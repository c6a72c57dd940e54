"""`queueing`: long runs of known queues through the serving loop."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracles.queueing import Queue, waits_by_recursion, waits_of_loop

from loadmaster.placement.comparison.intervals import NORMAL_REACH, standard_error

KINDS = (("exponential", 1), ("deterministic", 1), ("lognormal", 1), ("exponential", 4))
LOADS = (0.5, 0.8)
REQUESTS = {0.5: 1_000_000, 0.8: 3_000_000}
BATCHES = 30     # for the band of the mean
SEED = 0


def queueing() -> dict[str, Any]:
    """Mean waits against the formulas (2 %), each wait against the recursion (1e-9)."""
    rows = []
    for service, servers in KINDS:
        for load in LOADS:
            rows.append(_row(Queue(service, servers, load), REQUESTS[load]))
    return {
        "holds": all(abs(r["error"]) <= 0.02 and r["recursion"] <= 1e-9 for r in rows),
        "worst_error": max(abs(r["error"]) for r in rows),
        "worst_recursion": max(r["recursion"] for r in rows),
        "seed": SEED,
        "rows": rows,
    }


def _row(queue: Queue, requests: int) -> dict[str, Any]:
    arrival, service = queue.draw(requests, SEED)
    waits = waits_of_loop(arrival, service, queue.servers)
    exact = waits_by_recursion(arrival, service, queue.servers)
    formula = queue.mean_wait_ns()
    batch_means = waits[: requests // BATCHES * BATCHES].reshape(BATCHES, -1).mean(axis=1)
    band = NORMAL_REACH * standard_error(batch_means) / formula
    return {
        "queue": queue.name, "load": queue.load, "requests": requests,
        "wait_us": float(waits.mean() / 1e3), "formula_us": formula / 1e3,
        "error": float(waits.mean() / formula - 1.0), "band": float(band),
        "recursion": float(np.abs(waits - exact).max() / formula),
    }
