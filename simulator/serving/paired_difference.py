"""How far plans lie apart for the very same requests, with bands.

Every plan served the same requests with the same routing, so latencies are set against each other
request by request, and what makes a request long under any plan cancels out. Neighbours share
steps and queues and are late together: whole stretches of requests are drawn again (a circular
block bootstrap), as long as the number of requests in flight. Deterministic for a seed.
Knows latencies. Knows nothing of plans or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import FloatArray
from ...placement.comparison.intervals import CONFIDENCE, band, few_draws_factor
from ..random_streams import stream

FEWEST_REQUESTS = 5          # fewer say nothing about others
FEWEST_BLOCKS, MOST_BLOCKS = 10, 2000
RESAMPLES = 1000


@dataclass(frozen=True)
class Behind:
    """One plan against the best: how much longer its mean latency is, with the 95 % band."""

    name: str
    mean_us: float
    behind_us: float
    low_us: float            # infinite where the requests are too few to tell
    high_us: float
    best: bool
    best_us: float           # the best plan's mean latency

    @property
    def indistinguishable(self) -> bool:
        """Not the best, but the band of the difference holds zero."""
        return not self.best and self.low_us <= 0.0

    @property
    def percent(self) -> tuple[float, float, float]:
        """(difference, low, high) in per cent of the best plan's mean latency."""
        scale = 100.0 / self.best_us
        return self.behind_us * scale, self.low_us * scale, self.high_us * scale


@dataclass(frozen=True)
class Paired:
    """Plans, least mean latency first; ties in the order given. block: requests drawn together."""

    rows: tuple[Behind, ...]
    requests: int
    block: int
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> str:
        """The name of the plan with the least mean latency."""
        return self.rows[0].name

    def row(self, name: str) -> Behind:
        """The row of one plan."""
        return next(row for row in self.rows if row.name == name)

    def verdict(self) -> str:
        """One sentence: the best plan, which are worse and by how much, which indistinguishable."""
        best, *others = self.rows
        text = f"{best.name}: mean latency {_time_text(best.mean_us)}"
        if not others:
            return text
        if not all(np.isfinite(row.high_us) for row in others):
            return (
                f"not enough data: {best.name} came out best (mean latency "
                f"{_time_text(best.mean_us)}), but {self.requests} requests cannot tell how far "
                "that may be off: serve more requests"
            )
        parts = [text]
        same = [row.name for row in others if row.indistinguishable]
        if same:
            parts.append(f"indistinguishable from it: {', '.join(same)}")
        for row in others:
            if not row.indistinguishable:
                change, low, high = row.percent
                parts.append(f"{row.name} is {change:.1f} % slower (± {(high - low) / 2:.1f})")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where a band has no end."""
        def finite(value: float) -> float | None:
            return value if np.isfinite(value) else None

        return {
            "best": self.best,
            "confidence": CONFIDENCE,
            "method": "circular block bootstrap over requests, paired",
            "resamples": RESAMPLES,
            "requests": self.requests,
            "block_requests": self.block,
            "rows": [
                {
                    "name": row.name, "latency_mean_us": row.mean_us,
                    "behind_best_us": row.behind_us, "low_us": finite(row.low_us),
                    "high_us": finite(row.high_us), "behind_best_percent": row.percent[0],
                    "best": row.best, "indistinguishable": row.indistinguishable,
                }
                for row in self.rows
            ],
        }


def set_side_by_side(
    latency_us: Mapping[str, FloatArray], in_flight: float, *, seed: int = 0
) -> Paired:
    """Compare plans by mean latency. latency_us: name -> [R], the same requests in one order.

    in_flight: mean number of requests that were served at a time, which sets the block.
    """
    names = list(latency_us)
    requests = len(latency_us[names[0]])
    order = sorted(names, key=lambda name: float(latency_us[name].mean()))
    best_R = latency_us[order[0]]
    best_us = float(best_R.mean())
    block = _block(requests, in_flight)
    start_BN = _starts(requests, block, seed)
    rows = []
    for name in order:
        gap_R = latency_us[name] - best_R
        gap = float(gap_R.mean())
        low, high = (gap, gap) if name == order[0] else band(gap, _noise(gap_R, block, start_BN))
        rows.append(Behind(name, float(latency_us[name].mean()), gap, low, high,
                           name == order[0], best_us))
    notes = []
    if len(names) > 1 and in_flight > block and requests >= FEWEST_REQUESTS:
        notes.append(
            f"bands: about {in_flight:.0f} of {requests} requests were in flight at a time, too "
            "many for reliable bands: serve more requests"
        )
    return Paired(tuple(rows), requests, block, tuple(notes))


def _time_text(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us < 1e6 else f"{us / 1e6:,.3f} s"


def _block(requests: int, in_flight: float) -> int:
    """Requests drawn together: twice those in flight, for at least 10 and at most 2,000 blocks."""
    longest = max(1, requests // FEWEST_BLOCKS)
    return max(min(max(round(2 * in_flight), 1), longest), -(-requests // MOST_BLOCKS))


def _starts(requests: int, block: int, seed: int) -> npt.NDArray[np.int64]:
    """[B, N] where each drawn stretch of requests begins."""
    blocks = max(1, round(requests / block))
    return stream(seed, "bands").integers(0, requests, (RESAMPLES, blocks))


def _noise(
    gap_R: FloatArray, block: int, start_BN: npt.NDArray[np.int64]
) -> FloatArray | None:
    """[B] how far each draw's mean lies from the mean of all; None = too few requests to tell."""
    blocks = start_BN.shape[1]
    if len(gap_R) < FEWEST_REQUESTS or blocks < 2:
        return None
    ring = np.concatenate(([0.0], np.cumsum(np.concatenate((gap_R, gap_R[:block])))))
    sum_R = ring[block : block + len(gap_R)] - ring[: len(gap_R)]
    mean_B = sum_R[start_BN].sum(axis=1) / (blocks * block)
    return np.asarray((mean_B - gap_R.mean()) * few_draws_factor(blocks), np.float64)
