"""What happens between an expert's two matrix products.

Knows the gated activations of the supported models and how their rows are stored; knows nothing
of slots, routing or which backend multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError

ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "gptoss_clamped"]


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


def gated_inplace(gate_AI: Tensor, up_AI: Tensor, activation: ExpertActivation) -> Tensor:
    """Turn gate and up products into the input of the down product; overwrites both.

    gate_AI, up_AI: [rows, I], inner axis contiguous. Returns gate_AI, overwritten.
    Pass both as column views of one [rows, 2I] buffer: rows that do not lie back to back are
    walked one by one, so an element's bits depend on its column and never on its neighbours'
    number (a flat walk would send the last few elements of the buffer down another code path).
    """
    if activation.kind == "gptoss_clamped":
        assert activation.limit is not None and activation.alpha is not None
        gate_AI.clamp_(max=activation.limit)
        up_AI.clamp_(min=-activation.limit, max=activation.limit)
        gate_AI.mul_(torch.sigmoid(gate_AI * activation.alpha))
        return gate_AI.mul_(up_AI.add_(1.0))
    if activation.kind == "silu":
        F.silu(gate_AI, inplace=True)
    elif activation.kind == "relu":
        F.relu_(gate_AI)
    else:
        approximate = "tanh" if activation.kind == "gelu_tanh" else "none"
        gate_AI.copy_(F.gelu(gate_AI, approximate=approximate))
    return gate_AI.mul_(up_AI)
