"""The one entry to the grouped gated expert MLP; chooses the backend.

Knows the weights of one layer's local slots and rows sorted by slot; knows nothing of experts'
names, plans, ranks or networks. Callers never name a backend, except to test one.

Axes: A rows (one per assignment), S local slots, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .activation import ExpertActivation
from .weights import BACKENDS, ExpertWeights

__all__ = ["BACKENDS", "ExpertActivation", "ExpertWeights", "grouped_experts"]


def grouped_experts(
    x_AH: Tensor, count_S: Tensor, weights: ExpertWeights, *, out: Tensor | None = None
) -> Tensor:
    """Run every row through the expert of its slot.

    x_AH: [A, H] rows sorted by slot. count_S: [S] rows of each slot on the CPU, summing to A.
    Returns y [A, H], rows in the same order, not weighted. On the CPU a row's bits depend on the
    row and its expert only: panels compute it so, libraries are called in blocks of fixed sizes,
    and no backend is taken that did not pass a trial on these widths (`self_check.py`). On a GPU
    that is what the kernels are written for and `benchmarks/kernels_gpu.py` looks at; it is not
    promised there. Raises InputError when shapes, dtypes or counts do
    not fit.
    """
    _check_rows(x_AH, weights)
    whole = count_S.dtype in (torch.int32, torch.int64)
    if tuple(count_S.shape) != (weights.shape.slots,) or not whole or count_S.device.type != "cpu":
        raise InputError(
            f"count_S is {tuple(count_S.shape)} {count_S.dtype} on {count_S.device}; "
            f"it must be [{weights.shape.slots}] int32 or int64 on cpu"
        )
    counts = count_S.tolist()
    if min(counts) < 0 or sum(counts) != len(x_AH):
        raise InputError(
            f"count_S holds {sum(counts)} rows (lowest count {min(counts)}) for the "
            f"{len(x_AH)} rows given; counts must be >= 0 and sum to the rows"
        )
    out = _output_like(x_AH, out)
    if len(x_AH):
        weights.run(x_AH.detach(), count_S, out)
    return out


def _output_like(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise InputError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; "
            f"it must be {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    if out.requires_grad:
        raise InputError("out requires grad; experts have no backward: give out.detach()")
    if any(size > 1 and not step for size, step in zip(out.shape, out.stride(), strict=True)):
        raise InputError("out is expanded: its rows share memory; give one that owns its rows")
    return out


def _check_rows(x: Tensor, weights: ExpertWeights) -> None:
    if x.dim() != 2 or x.shape[1] != weights.shape.hidden:
        raise InputError(f"rows are {tuple(x.shape)}; they must be [rows, {weights.shape.hidden}]")
    if x.dtype != weights.shape.dtype or x.device != weights.shape.device:
        raise InputError(
            f"rows are {x.dtype} on {x.device} but the weights {weights.shape.dtype} on "
            f"{weights.shape.device}; convert one of them"
        )
