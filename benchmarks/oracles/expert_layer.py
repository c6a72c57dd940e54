"""The expert layer as its definition reads: float64, one row at a time, no shortcuts.

What every backend is checked against, in tests, benchmarks and on a new GPU. Slow on purpose;
shares no code with the backends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loadmaster.kernels.activation import ExpertActivation


def expert_row(x_H: Tensor, expert: Mapping[str, Tensor], activation: ExpertActivation) -> Tensor:
    """One expert on one row: down(f(gate(x), up(x))), in float64."""
    product = expert["gate_up"].double() @ x_H.double()
    if "gate_up_bias" in expert:
        product = product + expert["gate_up_bias"].double()
    half = len(product) // 2
    gate, up = product[:half], product[half:]
    if activation.interleaved:
        gate, up = product[0::2], product[1::2]
    y_H = expert["down"].double() @ _gated(gate, up, activation)
    if "down_bias" in expert:
        y_H = y_H + expert["down_bias"].double()
    return y_H


def expert_rows(
    x_AH: Tensor,
    slot_A: Sequence[int],
    experts: Sequence[Mapping[str, Tensor]],
    activation: ExpertActivation,
) -> Tensor:
    """Each row through the expert of its slot: [A, H] float64."""
    y_AH = torch.zeros(x_AH.shape, dtype=torch.float64)
    for row, slot in enumerate(slot_A):
        y_AH[row] = expert_row(x_AH[row], experts[slot], activation)
    return y_AH


def expert_layer(
    x_TH: Tensor,
    slot_TK: Tensor,
    gate_TK: Tensor,
    experts: Sequence[Mapping[str, Tensor]],
    activation: ExpertActivation,
) -> Tensor:
    """The whole layer: [T, H] float64. Negative slots add nothing."""
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t, slots in enumerate(slot_TK.tolist()):
        for k, slot in enumerate(slots):
            if slot >= 0:
                y_H = expert_row(x_TH[t], experts[slot], activation)
                out_TH[t] += gate_TK[t, k].double() * y_H
    return out_TH


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| over the whole tensor; 0 for two empty or zero ones.

    NaN anywhere gives NaN, which fails every comparison.
    """
    difference = float((got.double() - expected.double()).norm())
    size = float(expected.double().norm())
    return difference if size == 0.0 else difference / size


def _gated(gate: Tensor, up: Tensor, activation: ExpertActivation) -> Tensor:
    if activation.kind == "gptoss_clamped":
        assert activation.limit is not None and activation.alpha is not None
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
        return (up + 1) * gate / (1 + torch.exp(-activation.alpha * gate))
    if activation.kind == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation.kind == "relu":
        return gate.clamp(min=0) * up
    if activation.kind == "gelu":
        return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up
