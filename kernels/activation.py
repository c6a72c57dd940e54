"""What happens between an expert's two matrix products.

Knows the gated activations of the supported models and how their rows are stored; knows nothing
of slots, routing or which backend multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

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
        rows first.
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


def stored_tensors(tensors: dict[str, Tensor], activation: ExpertActivation) -> dict[str, Tensor]:
    """One expert's tensors with gate rows first, in the order the model stores."""
    return {
        name: stored_rows(tensor, activation) if "gate_up" in name else tensor
        for name, tensor in tensors.items()
    }
