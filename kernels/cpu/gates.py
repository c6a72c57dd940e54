"""The gate between an expert's two products, row by row: compiled loops on CPUs, torch elsewhere.

Knows rows and kinds of activation. Knows nothing of weights or slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..activation import ExpertActivation
from . import loops
from .scalars import as_array

COMPILED_DTYPES = (torch.float32, torch.bfloat16)


_TORCH_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


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
