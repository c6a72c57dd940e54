"""The layer that the GPU benchmarks time, and how one run of it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from loadmaster.kernels.time_experts import microseconds

REPEATS = 30


@dataclass(frozen=True)
class Shape:
    """The layer that is timed."""

    experts: int
    hidden: int
    intermediate: int
    choices: int
    tokens: tuple[int, ...]

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * 2

    def flops(self, tokens: int) -> float:
        return 6.0 * tokens * self.choices * self.hidden * self.intermediate


def median_us(device: Any, runs: list[Callable[[], object]], repeats: int = REPEATS) -> float:
    """Median of single runs, walking round `runs` (one per weight set) after one warm-up round."""
    repeats = repeats if device.type == "cuda" else 1
    for run in runs:
        run()
    return median(microseconds(device, runs[i % len(runs)]) for i in range(repeats))
