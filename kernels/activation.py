"""What happens between an expert's two matrix products.

Knows the gated activations of the supported models and how their rows are stored; knows nothing
of slots, routing or which backend multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .cpu import loops
from .cpu.scalars import as_array

ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "gptoss_clamped"]

COMPILED_DTYPES = (torch.float32, torch.bfloat16)
_TORCH_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class ExpertActivation:
    """How one expert turns its gate and up products into the input of its down product.

    kind: the function of the gate; all but `gptoss_clamped` give `f(gate) * up`. gpt-oss clamps
        gate to at most `limit` and up to [-limit, limit], then gives
        `(up + 1) * gate * sigmoid(alpha * gate)`.
    limit, alpha: gpt-oss's two numbers; both needed there, refused elsewhere.
    interleaved: gate and up rows of the stored matrix alternate (gpt-oss) instead of all gate
        rows standing first.
    """

    kind: ActivationKind
    limit: float | None = None
    alpha: float | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(ActivationKind):
            known = ", ".join(get_args(ActivationKind))
            raise InputError(f"activation {self.kind!r} is not known; use one of {known}")
        clamped = self.kind == "gptoss_clamped"
        if clamped and (self.limit is None or self.alpha is None):
            raise InputError("activation 'gptoss_clamped' needs both limit and alpha")
        if not clamped and not (self.limit is None and self.alpha is None):
            raise InputError(f"activation {self.kind!r} takes neither limit nor alpha")


def gate_rows_first(gate_up: Tensor, activation: ExpertActivation) -> Tensor:
    """The stored rows [2I, ...] with the I gate rows first, then the I up rows."""
    if not activation.interleaved:
        return gate_up
    return torch.cat((gate_up[0::2], gate_up[1::2]))


def stored_rows(gate_first: Tensor, activation: ExpertActivation) -> Tensor:
    """The inverse of `gate_rows_first`: rows [2I, ...] back in the order the model stores."""
    if not activation.interleaved:
        return gate_first
    intermediate = len(gate_first) // 2
    return torch.stack((gate_first[:intermediate], gate_first[intermediate:]), dim=1).flatten(0, 1)


def compiled_activation(activation: ExpertActivation) -> tuple[int, np.float32, np.float32]:
    """The kind's number, limit and alpha, as compiled loops take them."""
    kind = loops.ACTIVATIONS.index(activation.kind)
    return kind, np.float32(activation.limit or 0.0), np.float32(activation.alpha or 0.0)


def gated_rows(gate_up_A2I: Tensor, activation: ExpertActivation, out_AI: Tensor) -> None:
    """Gate and up products, gate columns first, into the input of the down product.

    On the CPU, float32 and bfloat16 take compiled loops: torch's own would send the last few
    elements of a tensor down another code path, so a row's bits would depend on its neighbours.
    """
    compiled = gate_up_A2I.device.type == "cpu" and gate_up_A2I.dtype in COMPILED_DTYPES
    if compiled:
        kind, limit, alpha = compiled_activation(activation)
        loops.activate_rows(kind, as_array(gate_up_A2I), limit, alpha, as_array(out_AI))
        return
    gate, up = gate_up_A2I.tensor_split(2, dim=1)
    if activation.kind == "gptoss_clamped":
        assert activation.limit is not None and activation.alpha is not None
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
        torch.mul(gate * torch.sigmoid(gate * activation.alpha), up + 1.0, out=out_AI)
    else:
        torch.mul(_TORCH_GATES[activation.kind](gate), up, out=out_AI)
