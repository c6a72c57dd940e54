"""Measure this machine into a hardware profile: the verb `calibrate`.

Three owners meet here: `expert_fit.py` times experts, `exchange_bench.py` times the exchange,
`simulator/calibrate/machine_profile.py` fits. Knows none of their insides.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ...errors import UsageError
from ...placement.hardware import HardwareProfile
from ...simulator.calibrate.fits import exchange_rows_from
from ...simulator.calibrate.machine_profile import machine_profile
from ...traces.model_spec import ModelSpec
from ..protocol.settings import DTYPE_BYTES
from .exchange_bench import measure_exchange
from .expert_fit import time_model_experts

ACTIVE_EXPERTS = (4, 8, 16)


def calibrate_machine(
    model: ModelSpec,
    *,
    ranks: int = 4,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] = lambda text: None,
) -> HardwareProfile:
    """Experts of the model's shape on one thread, and the exchange between `ranks` processes.

    Takes a minute or so; other work on the machine shows in the figures.
    """
    if dtype not in ("bfloat16", "float32"):
        raise UsageError(f"dtype {dtype!r} cannot be timed; use bfloat16 or float32")
    progress("timing experts")
    compute, compute_error = time_model_experts(model, dtype, active_experts=ACTIVE_EXPERTS)
    progress("timing the exchange")
    exchange = measure_exchange(ranks, num_experts=model.num_experts)
    return machine_profile(
        name="this-machine",
        compute=compute,
        compute_error=compute_error,
        exchange=exchange_rows_from(exchange.rows),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        counts_collective_us=exchange.counts_us,
        bytes_per_value=float(DTYPE_BYTES[dtype]),
    )
