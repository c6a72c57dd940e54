"""A profile of the machine at hand from what was timed on it: tables of medians, no formula.

`kernels/time_experts.py` times experts and `workers/calibrate/exchange_bench.py` the exchange; this
turns their figures into what `step_cost` prices with, and says how far it is off between its
points. Knows nothing of how they were measured.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.arrays import FloatArray
from ...placement.hardware import ComputeProfile, ExchangeProfile, HardwareProfile
from .fits import ExchangeRows, FitError, fit_exchange


def fit_table(tokens: npt.ArrayLike, us: npt.ArrayLike) -> tuple[tuple[float, ...],
                                                                 tuple[float, ...]]:
    """(points, us): medians per point, made to rise (isotonic regression).

    For an expert timed over token counts, and for links that no straight line fits (NCCL).
    """
    from scipy.optimize import isotonic_regression

    tokens_M, us_M = np.asarray(tokens, np.float64), np.asarray(us, np.float64)
    if tokens_M.shape != us_M.shape or tokens_M.ndim != 1 or not len(tokens_M):
        raise InputError(f"points {tokens_M.shape} and us {us_M.shape} must be equal, not empty")
    unique = np.unique(tokens_M)
    medians = [float(np.median(us_M[tokens_M == t])) for t in unique]
    rising = isotonic_regression(np.maximum(medians, 0.0)).x
    return tuple(unique.tolist()), tuple(rising.tolist())


def fit_expert_table(
    tokens: npt.ArrayLike,
    active: npt.ArrayLike,
    us: npt.ArrayLike,
    *,
    flops_per_assignment: float,
    expert_bytes: float,
) -> tuple[ComputeProfile, FitError]:
    """A device's experts: what a call costs before its first expert, and a table per expert.

    tokens, active, us [M]: a call of `active` experts with `tokens` each took `us`. The error is
    of calls whose token count is left out of the table (every one but the first and the last).
    Raises InputError on fewer than 3 token counts.
    """
    tokens_M, active_M, us_M = (np.asarray(x, np.float64) for x in (tokens, active, us))
    counts = np.unique(tokens_M)
    if len(counts) < 3:
        raise InputError(f"{len(counts)} token counts: an error needs at least 3, give more")
    start_us = _start_us(tokens_M, active_M, us_M)
    each_us_M = np.maximum(us_M - start_us, 0.0) / active_M
    predicted_M = np.empty_like(us_M)
    for count in counts[1:-1]:
        known = tokens_M != count
        table = fit_table(tokens_M[known], each_us_M[known])
        predicted_M[~known] = start_us + active_M[~known] * np.interp(count, *table)
    between = (tokens_M > counts[0]) & (tokens_M < counts[-1])
    table_tokens, table_us = fit_table(tokens_M, each_us_M)
    profile = ComputeProfile(
        start_us=start_us,
        hbm_bytes_per_s=expert_bytes / max(table_us[0], 1e-6) * 1e6,
        flops_per_s=table_tokens[-1] * flops_per_assignment / max(table_us[-1], 1e-6) * 1e6,
        expert_table_tokens=table_tokens, expert_table_us=table_us,
    )
    return profile, FitError.of(predicted_M[between], us_M[between])


def machine_profile(
    *,
    name: str,
    compute: ComputeProfile,
    compute_error: FitError,
    exchange: ExchangeRows,
    memory_bytes: int,
    counts_collective_us: float = 0.0,
    bytes_per_value: float = 4.0,
) -> HardwareProfile:
    """A profile of the machine at hand: its expert table, an exchange line, and their errors."""
    link = fit_exchange(exchange)
    both = ExchangeProfile(alpha_us=link.alpha_us, nvlink_bytes_per_s=link.bytes_per_s,
                           nic_bytes_per_s=link.bytes_per_s)
    return HardwareProfile(
        name=name, compute=compute, dispatch=both, combine=both,
        counts_collective_us=counts_collective_us, counts_always=counts_collective_us > 0,
        memory_bytes=memory_bytes,
        dispatch_bytes_per_value=bytes_per_value, combine_bytes_per_value=bytes_per_value,
        source="measured on this machine",
        error=f"experts at token counts left out of the fit: {compute_error}; "
        f"exchange: {link.error}",
    )


def _start_us(tokens_M: FloatArray, active_M: FloatArray, us_M: FloatArray) -> float:
    """The line over active experts at 0, the median over token counts; 0 where active is one."""
    if len(np.unique(active_M)) < 2:
        return 0.0
    starts = [
        float(np.polyfit(active_M[tokens_M == t], us_M[tokens_M == t], 1)[1])
        for t in np.unique(tokens_M)
    ]
    return max(0.0, float(np.median(starts)))
