"""A layer's time as a sum of what its experts take: fitted on some token counts, judged on others.

Uses the rows `kernels/bench.py` measures and the table fit of `simulator/calibrate.py`, as
`loadmaster calibrate` does; `kernels.py` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from kernels_cpu import CPU, PREFILL, medians_ms
from torch import Tensor

from loadmaster.kernels.bench import SILU, ExpertTiming, cold_layers, time_experts
from loadmaster.kernels.grouped import ExpertWeights, moe_layer
from loadmaster.kernels.routing import histogram, top_k
from loadmaster.simulator.calibrate import fit_expert_table

TABLE_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
ACTIVE = 8
FITTED_TOKENS = (32, 128, 512, 2048)
HELD_TOKENS = (48, 96, 192, 320, 768, 1024, 1536)
ZIPF = (0.0, 1.0, 1.5)


@dataclass(frozen=True)
class Case:
    """One measured layer: how its tokens fell, and how long it took."""

    tokens: int
    zipf: float
    count_E: list[int]
    measured_us: float


def fit() -> dict[str, Any]:
    """Median and worst relative error of the held token counts, per dtype."""
    result: dict[str, Any] = {}
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        result[label] = _fit_dtype(dtype)
    result["holds"] = all(result[label]["holds"] for label in ("bf16", "fp32"))
    return result


def _fit_dtype(dtype: torch.dtype) -> dict[str, Any]:
    shape = PREFILL
    weights, *_ = cold_layers(
        shape.hidden, shape.intermediate, dtype, CPU, "auto", SILU, slots=shape.experts, seed=0
    )
    # Experts before and after the layers: a machine that grows slower meanwhile biases neither.
    rows = _time_experts(dtype)
    cases = _measure(weights, dtype, (*FITTED_TOKENS, *HELD_TOKENS))
    rows += _time_experts(dtype)
    table_tokens, table_us = fit_expert_table(
        [row.tokens_per_expert for row in rows if row.active_experts == ACTIVE],
        [row.cpu_us / ACTIVE for row in rows if row.active_experts == ACTIVE],
    )
    fitted = [case for case in cases if case.tokens in FITTED_TOKENS]
    held = [case for case in cases if case.tokens in HELD_TOKENS]
    start_us, assignment_us = _remainder(fitted, table_tokens, table_us)
    errors = [
        _predict(case, table_tokens, table_us, start_us, assignment_us) / case.measured_us - 1.0
        for case in held
    ]
    sizes = [abs(error) for error in errors]
    return {
        "median": round(median(sizes), 4),
        "worst": round(max(sizes), 4),
        "start_us": round(start_us, 1),
        "assignment_us": round(assignment_us, 4),
        "table": {str(int(t)): round(us, 1) for t, us in zip(table_tokens, table_us, strict=True)},
        "held": [
            {"tokens": case.tokens, "zipf": case.zipf, "measured_us": round(case.measured_us, 1),
             "error": round(error, 4)}
            for case, error in zip(held, errors, strict=True)
        ],
        "target": "median <= 0.05, worst <= 0.20",
        "holds": median(sizes) <= 0.05 and max(sizes) <= 0.20,
    }


def _time_experts(dtype: torch.dtype) -> list[ExpertTiming]:
    return time_experts(
        PREFILL.hidden, PREFILL.intermediate,
        dtype=dtype, tokens_per_expert=TABLE_TOKENS, active_experts=(1, ACTIVE), repeats=5,
    )


def _measure(weights: ExpertWeights, dtype: torch.dtype, tokens: Sequence[int]) -> list[Case]:
    """Whole layers at every token count and skew, interleaved."""
    shape, generator = PREFILL, torch.Generator().manual_seed(2)
    runs, counts = {}, {}
    for count in tokens:
        for zipf in ZIPF:
            x = torch.randn(count, shape.hidden, generator=generator).to(dtype)
            gate, ids = _route(count, zipf, generator)
            counts[f"{count} {zipf}"] = histogram(ids, shape.experts).tolist()
            runs[f"{count} {zipf}"] = (
                lambda x=x, ids=ids, gate=gate: moe_layer(x, ids, gate, weights)
            )
    ms = medians_ms(runs, repeats=7)
    return [
        Case(count, zipf, counts[f"{count} {zipf}"], ms[f"{count} {zipf}"] * 1e3)
        for count in tokens for zipf in ZIPF
    ]


def _route(tokens: int, zipf: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    draws = torch.rand(tokens, PREFILL.experts, generator=generator).clamp(1e-9, 1 - 1e-7)
    popularity = zipf * torch.log(torch.arange(1, PREFILL.experts + 1))
    return top_k(-torch.log(-torch.log(draws)) - popularity, PREFILL.choices, normalize=True)


def _experts_us(
    case: Case, table_tokens: Sequence[float], table_us: Sequence[float]
) -> float:
    """Sum over active experts of the table, continued along its last piece."""
    slope = (table_us[-1] - table_us[-2]) / (table_tokens[-1] - table_tokens[-2])
    active = np.array([count for count in case.count_E if count])
    beyond = np.maximum(active - table_tokens[-1], 0) * slope
    return float((np.interp(active, table_tokens, table_us) + beyond).sum())


def _remainder(
    fitted: Sequence[Case], table_tokens: Sequence[float], table_us: Sequence[float]
) -> tuple[float, float]:
    """What the experts do not explain: a start, and gather and combine per assignment."""
    from scipy.optimize import nnls

    assignments = np.array([sum(case.count_E) for case in fitted], np.float64)
    measured = np.array([case.measured_us for case in fitted])
    left = measured - [_experts_us(case, table_tokens, table_us) for case in fitted]
    terms = np.stack([np.ones(len(fitted)), assignments], axis=1) / measured[:, None]
    (start_us, assignment_us), _ = nnls(terms, left / measured)
    return float(start_us), float(assignment_us)


def _predict(
    case: Case,
    table_tokens: Sequence[float],
    table_us: Sequence[float],
    start_us: float,
    assignment_us: float,
) -> float:
    experts_us = _experts_us(case, table_tokens, table_us)
    return start_us + sum(case.count_E) * assignment_us + experts_us
