"""Measure this machine into a hardware profile: the verb `calibrate`.

Three owners meet here: `kernels/bench.py` times experts, `exchange_bench.py` times the exchange,
`simulator/calibrate.py` fits. Knows none of their insides.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from ..errors import UsageError
from ..placement.hardware import HardwareProfile
from ..simulator.calibrate import machine_profile
from ..simulator.measured import exchange_rows_from
from ..traces.spec import ModelSpec
from .exchange_bench import measure_exchange
from .settings import DTYPE_BYTES

ACTIVE_EXPERTS = (4, 8, 16)


def calibrate_machine(
    model: ModelSpec,
    *,
    ranks: int = 4,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] = lambda said: None,
) -> HardwareProfile:
    """Experts of the model's shape on one thread, and the exchange between `ranks` processes.

    Takes a minute or so; other work on the machine shows in the figures.
    """
    import torch

    from ..kernels.bench import time_experts

    if dtype not in ("bfloat16", "float32"):
        raise UsageError(f"dtype {dtype!r} cannot be timed; use bfloat16 or float32")
    assert model.hidden and model.intermediate
    progress("timing experts")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = time_experts(
            model.hidden, model.intermediate, dtype=getattr(torch, dtype),
            active_experts=ACTIVE_EXPERTS,
        )
    finally:
        torch.set_num_threads(threads)
    progress("timing the exchange")
    exchange = measure_exchange(ranks, num_experts=model.num_experts)
    start_us = _start_us([(r.tokens_per_expert, r.active_experts, r.cpu_us) for r in rows])
    each_us = [(r.cpu_us - start_us) / r.active_experts + start_us for r in rows]
    return machine_profile(
        name="this-machine",
        expert_tokens=[r.tokens_per_expert for r in rows],
        expert_us=each_us,
        exchange=exchange_rows_from(exchange.rows),
        flops_per_assignment=model.flops_per_assignment,
        expert_bytes=float(model.bytes_per_expert_E()[0]),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        start_us=start_us,
        counts_collective_us=exchange.counts_us,
        bytes_per_value=float(DTYPE_BYTES[dtype]),
    )


def _start_us(rows: list[tuple[int, int, float]]) -> float:
    """What a call costs before its first expert: the line over active experts at 0, median."""
    starts = []
    for tokens in sorted({t for t, _, _ in rows}):
        points = [(active, us) for t, active, us in rows if t == tokens]
        active, us = (np.array(x, np.float64) for x in zip(*points, strict=True))
        starts.append(float(np.polyfit(active, us, 1)[1]))
    return max(0.0, float(np.median(starts)))
