"""A layer's time from what its experts take one by one: the calibrated model on other token counts.

The model is the one `loadmaster calibrate` makes (rows of `kernels/time_experts.py`, fit of
`simulator/calibrate/machine_profile.py`): experts alone are timed, no layer. Judged on whole layers
of routed tokens that it has not seen, sampled in the same rounds. `kernels.py` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from kernels_cpu import CPU, PREFILL
from rank_layer import choose_experts, count_tokens, rank_layer
from torch import Tensor

from loadmaster.kernels.time_experts import (
    SILU,
    cold_layers,
    expert_runs,
    microseconds,
    steady_medians_us,
)
from loadmaster.placement.hardware import ComputeProfile, interpolate
from loadmaster.simulator.calibrate.machine_profile import fit_expert_table
from loadmaster.workers.calibrate.machine import ACTIVE_EXPERTS

LAYER_TOKENS = (48, 96, 192, 320, 768, 1024, 1536)
ZIPF = (0.0, 1.0, 1.5)
ROUNDS = 9
MEDIAN_BAR, WORST_BAR = 0.05, 0.20


def fit() -> dict[str, Any]:
    """Median and worst relative error over the layers, per dtype."""
    result: dict[str, Any] = {
        label: _fit_dtype(dtype)
        for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    return result | {"holds": all(row["holds"] for row in result.values())}


def _fit_dtype(dtype: torch.dtype) -> dict[str, Any]:
    shape = PREFILL
    experts = expert_runs(
        shape.hidden, shape.intermediate, dtype=dtype, active_experts=ACTIVE_EXPERTS
    )
    layers, count_E = _layers(dtype)
    us = steady_medians_us({**experts.once_us, **layers}, experts.reference_us, ROUNDS)
    compute, between_error = fit_expert_table(
        [tokens for tokens, _ in experts.once_us], [active for _, active in experts.once_us],
        [us[point] for point in experts.once_us],
        flops_per_assignment=shape.hidden * shape.intermediate * 6.0,
        expert_bytes=3.0 * shape.hidden * shape.intermediate * dtype.itemsize,
    )
    held = [
        {"tokens": tokens, "zipf": zipf, "measured_us": round(us[tokens, zipf], 1),
         "error": round(_layer_us(compute, count_E[tokens, zipf]) / us[tokens, zipf] - 1.0, 4)}
        for tokens, zipf in layers
    ]
    sizes = [abs(row["error"]) for row in held]
    return {
        "median": round(median(sizes), 4),
        "worst": round(max(sizes), 4),
        "between_table_points": str(between_error),
        "start_us": round(compute.start_us, 1),
        "table_us": {
            str(int(tokens)): round(each_us, 1) for tokens, each_us in
            zip(compute.expert_table_tokens, compute.expert_table_us, strict=True)
        },
        "held": held,
        "target": f"median <= {MEDIAN_BAR}, worst <= {WORST_BAR}",
        "holds": median(sizes) <= MEDIAN_BAR and max(sizes) <= WORST_BAR,
    }


def _layers(
    dtype: torch.dtype,
) -> tuple[dict[tuple[float, float], Callable[[], float]], dict[tuple[float, float], list[int]]]:
    """(tokens, zipf) -> run a whole layer once, microseconds; and how its tokens fell."""
    shape, generator = PREFILL, torch.Generator().manual_seed(2)
    weights, *_ = cold_layers(
        shape.hidden, shape.intermediate, dtype, CPU, "auto", SILU, slots=shape.experts, seed=0
    )
    runs: dict[tuple[float, float], Callable[[], float]] = {}
    counts: dict[tuple[float, float], list[int]] = {}
    for tokens in LAYER_TOKENS:
        for zipf in ZIPF:
            x = torch.randn(tokens, shape.hidden, generator=generator).to(dtype)
            gate, ids = _route(tokens, zipf, generator)
            counts[tokens, zipf] = count_tokens(ids, shape.experts).tolist()
            runs[tokens, zipf] = lambda x=x, ids=ids, gate=gate: microseconds(
                CPU, lambda: rank_layer(x, ids, gate, weights)
            )
    return runs, counts


def _route(tokens: int, zipf: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    draws = torch.rand(tokens, PREFILL.experts, generator=generator).clamp(1e-9, 1 - 1e-7)
    popularity = zipf * torch.log(torch.arange(1, PREFILL.experts + 1))
    return choose_experts(-torch.log(-torch.log(draws)) - popularity, PREFILL.choices)


def _layer_us(compute: ComputeProfile, count_E: list[int]) -> float:
    """Start, and every active expert by the table, continued along its last piece."""
    active = np.array([count for count in count_E if count], np.float64)
    each_us, _ = interpolate(active, compute.expert_table_tokens, compute.expert_table_us)
    return compute.start_us + float(each_us.sum())
