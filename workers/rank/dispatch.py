"""Which slots a rank's tokens take: the planner's rule, where each rank sees its own tokens only.

The rule is `placement/dispatch/assignment.py`. Between its first move and its second all ranks
gather their counts; then every rank computes the same quotas and assigns its own tokens. So a live
rank chooses, assignment by assignment, the slots that a replay of the whole step chooses. Knows the
active plans and the exchange; decides on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import InputError, LoadmasterError
from ...placement.cluster import Cluster
from ...placement.dispatch.assignment import (
    LayerDispatch,
    counts_gathered_first,
    layer_dispatch,
    layers_draws,
)
from ..protocol.phase_plans import Tables
from .exchange import Exchange, agree


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """One layer's step: where this rank's assignments go, and what all ranks send."""

    slot_TK: Tensor                      # int64; -1 = left out
    quota_GS: npt.NDArray[np.int32]      # by home rank and slot; the same on every rank


class LiveDispatch:
    """One rank's side of dispatch under its active plans. One step runs at a time."""

    def __init__(self, exchange: Exchange, tables: Tables, cluster: Cluster) -> None:
        self._exchange, self._tables, self._cluster = exchange, tables, cluster
        self._first = counts_gathered_first(tables.num_experts, cluster)
        self._layers: dict[tuple[int, int], LayerDispatch] = {}
        self._draws_PL = tuple(
            layers_draws(slots, tables.num_experts, cluster, spec, tables.layer_indices)
            for slots, spec in zip(tables.slots_PLGC, tables.dispatch_P, strict=True)
        )

    def assign(self, layer: int, phase: int, step: int, ids_TK: Tensor) -> Dispatched:
        """Slots for this rank's choices; every rank must call this at once.

        ids_TK: on the host; negative = left out. Raises EpochMismatchError on every rank
        when they are not in the same epoch and step.
        """
        rank, rule = self._exchange.rank, self._rule(layer, phase)
        ids = np.ascontiguousarray(ids_TK.numpy(), np.int32)
        if ids.max(initial=-1) >= self._tables.num_experts:
            raise InputError(
                f"layer {layer}: a token chose expert {ids.max()} of {self._tables.num_experts}"
            )
        own = rule.count(ids, np.full(len(ids), rank, np.int32))
        counts_GX = agree(
            self._exchange, self._tables.epoch, step, own.counts_GX[rank], first=self._first
        )
        split = rule.split(counts_GX)
        quota_GS = rule.quotas(counts_GX, split)
        slot_TK = rule.place(own, split)
        sent_S = np.bincount(slot_TK[slot_TK >= 0], minlength=quota_GS.shape[1])
        if not np.array_equal(sent_S, quota_GS[rank]):
            raise LoadmasterError(
                f"rank {rank}, layer {layer}: its tokens and the gathered counts disagree: nothing "
                "was sent; the counts were changed on their way"
            )
        return Dispatched(slot_TK=torch.from_numpy(slot_TK.astype(np.int64)), quota_GS=quota_GS)

    def _rule(self, layer: int, phase: int) -> LayerDispatch:
        if (layer, phase) not in self._layers:
            self._layers[layer, phase] = layer_dispatch(
                self._tables.slots_PLGC[phase][layer], self._tables.num_experts, self._cluster,
                self._tables.dispatch_P[phase], self._draws_PL[phase][layer],
            )
        return self._layers[layer, phase]
