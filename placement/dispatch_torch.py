"""Quotas on tensors: what live ranks call between the counts' all-gather and the exchange.

Knows tensors and where they live. The policies are `dispatch.py`'s, so a live rank and the planner
split alike, bit for bit. CPU tensors are read in place; tensors on a GPU are copied to the host and
the quotas back, which waits for the device once per layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cluster import Cluster
from .dispatch import split
from .plan import DispatchSpec


def split_torch(
    counts_GE: Tensor,
    slots_GC: Tensor | npt.NDArray[np.integer[Any]],
    cluster: Cluster,
    spec: DispatchSpec,
) -> Tensor:
    """`dispatch.split` on tensors: quotas [G, S] int32 on the device of the counts.

    counts_GE: whole tokens by home rank and expert, the same on all ranks where the policy needs
    all counts; elsewhere a rank may leave the other ranks' rows zero and read its own row only.
    slots_GC: the layer's slots, tensor or array, -1 = empty. Errors as `split`.
    """
    slots = slots_GC.detach().cpu().numpy() if isinstance(slots_GC, Tensor) else slots_GC
    counts = counts_GE.detach().to(device="cpu", dtype=torch.int32).numpy()
    return torch.from_numpy(split(counts, slots, cluster, spec)).to(counts_GE.device)
