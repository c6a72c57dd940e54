"""Where the simulator's benchmarks find real tables, arrivals and traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from loadmaster.traces.trace import RoutingTrace

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def absent() -> dict[str, Any]:
    """What a section answers without the data."""
    return {"holds": False, "skipped": "real data not present: ../shared/data"}


def routing(name: str, every_layer: int = 1) -> RoutingTrace:
    """One of the recorded traces, every n-th layer."""
    file = np.load(DATA / "routing" / f"{name}.npz")
    return RoutingTrace.from_arrays(
        file["ids"][:, ::every_layer], num_experts=int(file["n_experts"]), request=file["seq"],
        domain=file["dom"], domain_names=[str(d) for d in file["domains"]],
    )
