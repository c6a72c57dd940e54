"""Quotas on tensors: what live ranks call between the counts' all-gather and the exchange.

Knows tensors and where they live. The policies are `dispatch.py`'s, so a live rank and the planner
split alike, bit for bit. CPU tensors are read in place; tensors on a GPU are copied to the host and
the quotas back, which waits for the device once per layer.

Two ways. `split_torch`: gather counts by (rank, expert), split, place tokens in order. And for
`balanced` with payload per_rank `ClassDispatch`: gather counts by (rank, class), so that tokens
that visit a rank anyway carry the balance, as `evaluate` assumes for such clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...placement.cluster import Cluster
from ...placement.dispatch.dedup_classes import ClassTable
from ...placement.dispatch.deduplicated import (
    ClassQuotas,
    assign_classes,
    count_classes,
    slot_quotas,
    split_classes,
)
from ...placement.dispatch.policies import SLACK, parameter_vector
from ...placement.dispatch.quotas import split
from ...placement.dispatch.replica_table import SlotTable
from ...placement.plan import DispatchSpec


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


@dataclass(frozen=True, eq=False)
class ClassDispatch:
    """One layer's `balanced` dispatch where copies to one rank or node are sent once.

    Each rank: `count` its tokens; all ranks gather counts [G, X]; each: `split`, `assign`.
    """

    table: ClassTable
    speed_G: npt.NDArray[np.float64]
    slack: float

    @classmethod
    def of(
        cls, slots_GC: npt.NDArray[np.integer[Any]], num_experts: int, cluster: Cluster,
        spec: DispatchSpec,
    ) -> ClassDispatch:
        """Index one layer; good until its slots change."""
        table = ClassTable.of(SlotTable.of(slots_GC, num_experts), cluster)
        return cls(table, cluster.speed_G, float(parameter_vector(spec, cluster)[SLACK]))

    def count(self, ids_TK: Tensor, rank: int) -> tuple[npt.NDArray[np.int64], Tensor]:
        """(class of every assignment, for `assign`; counts [X] int64 of this rank, to gather)."""
        ids, home = _own(ids_TK, rank)
        class_TK, counts_GX = count_classes(ids, home, self.table)
        return class_TK, torch.from_numpy(counts_GX[rank]).to(ids_TK.device)

    def split(self, counts_GX: Tensor) -> tuple[ClassQuotas, Tensor]:
        """(quotas by class, for `assign`; quotas [G, S] int32, the sizes of the exchange)."""
        counts = counts_GX.detach().to(device="cpu", dtype=torch.int64).numpy()
        quotas = split_classes(counts, self.table, self.speed_G, self.slack)
        sizes = slot_quotas(counts, self.table, quotas)
        return quotas, torch.from_numpy(sizes).to(counts_GX.device)

    def assign(
        self, ids_TK: Tensor, rank: int, class_TK: npt.NDArray[np.int64], quotas: ClassQuotas
    ) -> Tensor:
        """slot_TK int32 of this rank's assignments; uses the quotas up."""
        ids, home = _own(ids_TK, rank)
        slots = assign_classes(ids, home, class_TK, self.table, quotas)
        return torch.from_numpy(slots).to(ids_TK.device)


def _own(ids_TK: Tensor, rank: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    ids = np.ascontiguousarray(ids_TK.detach().to(device="cpu", dtype=torch.int32).numpy())
    return ids, np.full(len(ids), rank, np.int32)
