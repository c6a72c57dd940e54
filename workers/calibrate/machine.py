"""Measure this machine into a hardware profile: the verb `calibrate`.

Three owners meet here: `kernels/time_experts.py` times experts, `exchange_bench.py` times the
exchange, `simulator/calibrate/machine_profile.py` fits. Knows none of their insides.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ...errors import UsageError
from ...placement.hardware import HardwareProfile
from ...simulator.calibrate.fits import exchange_rows_from
from ...simulator.calibrate.machine_profile import fit_expert_table, machine_profile
from ...traces.model_spec import ModelSpec
from ..protocol.settings import DTYPE_BYTES
from .exchange_bench import measure_exchange

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

    from ...kernels.time_experts import time_experts

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
    compute, compute_error = fit_expert_table(
        [r.tokens_per_expert for r in rows], [r.active_experts for r in rows],
        [r.cpu_us for r in rows],
        flops_per_assignment=model.flops_per_assignment,
        expert_bytes=float(model.bytes_per_expert_E()[0]),
    )
    return machine_profile(
        name="this-machine",
        compute=compute,
        compute_error=compute_error,
        exchange=exchange_rows_from(exchange.rows),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        counts_collective_us=exchange.counts_us,
        bytes_per_value=float(DTYPE_BYTES[dtype]),
    )
