"""Our experts implementation for transformers' experts interface: exchange, compute, combine.

Knows one rank's side of a layer: its tokens' choices, the slot active table, the experts held
here, the exchange. Knows nothing of requests, attention, Ray or how plans are made. The same
tokens, weights and any legal placement give the same bits on the CPU.

Dispatch is decided on the host and rows travel through its memory. Where the model is on a GPU, a
layer's rows are copied down and up once each way; on the CPU nothing is copied.

Axes: T tokens at home here, K choices, E experts, G ranks, C slots per rank, S = G * C, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import LoadmasterError
from ...kernels.routing import combine_rows, sort_by_slot
from ...placement.dispatch.token_limit import CapacityRule
from ..protocol.phase_plans import Tables
from . import attention, token_limit
from .attention import EXPERTS_IMPLEMENTATION
from .dispatch import LiveDispatch
from .exchange import Exchange, return_tokens, send_tokens
from .expert_store import ExpertStore


class RoutingRecorder(Protocol):
    """What a layer tells whoever records (`traces.record.Recorder` in a recording)."""

    def layer(self, layer: int, ids_TK: Any, gates_TK: Any = None) -> None: ...


@dataclass
class RoutingOverride:
    """Routing to use instead of the router's own, and what the router would have chosen."""

    ids_LTK: Tensor
    gates_LTK: Tensor
    own_ids_LTK: Tensor


@dataclass
class LayerMeasures:
    """What one step cost and carried here, per layer."""

    expert_cpu_us_L: npt.NDArray[np.float64]   # of the calling thread; on a GPU, the GPU's time
    tokens_L: npt.NDArray[np.int64]            # rows computed by this rank's experts
    remote_transfers_L: npt.NDArray[np.int64]     # rows this rank sent to other ranks
    dropped_L: npt.NDArray[np.int64]           # assignments of this rank's tokens left out
    peak_L: npt.NDArray[np.int64]              # most assignments of one expert, all ranks

    @classmethod
    def zeros(cls, layers: int) -> LayerMeasures:
        return cls(np.zeros(layers), *(np.zeros(layers, np.int64) for _ in range(4)))


@dataclass
class RankContext:
    """What all layers of one rank share during a step. One step runs at a time."""

    exchange: Exchange
    dispatch: LiveDispatch
    tables: Tables
    stores: list[ExpertStore]
    payload: str
    capacity: CapacityRule | None = None
    step: int = 0
    phase: int = 0
    recorder: RoutingRecorder | None = None
    replay: RoutingOverride | None = None
    measures: LayerMeasures = field(default_factory=lambda: LayerMeasures.zeros(0))


class _ExpertClock:
    """How long this rank's experts compute: CPU time of this thread, or the GPU's own time."""

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            self._events = [event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._began_ns = time.thread_time_ns()

    def stop_us(self) -> float:
        """Microseconds since it was made; waits for a GPU to finish."""
        if self._events is None:
            return (time.thread_time_ns() - self._began_ns) / 1e3
        begin, end = self._events
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


class ExpertLayer:
    """One MoE layer as this rank sees it; hangs on transformers' experts module."""

    def __init__(
        self,
        layer: int,
        context: Callable[[], RankContext],
        scores: token_limit.RouterScores | None = None,
    ) -> None:
        """scores: what the router thinks of all experts, for rerouting overflow."""
        self.layer = layer
        self._context = context
        self._scores = scores

    def forward(self, x_TH: Tensor, ids_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """The experts' output for this rank's tokens; every rank must call this at once.

        Padding rows (beyond the packed step's) choose nothing and come out as zeros.
        """
        context = self._context()
        rows = attention.current().rows
        out = torch.zeros_like(x_TH)
        ids, gates = ids_TK[:rows].cpu(), gate_TK[:rows].cpu()
        if context.replay is not None:
            ids, gates = self._replayed(context.replay, ids)
        if context.recorder is not None:
            context.recorder.layer(self.layer, ids, gates)
        out[:rows] = self._exchanged(context, x_TH[:rows], ids, gates)
        return out

    def _exchanged(
        self, context: RankContext, x_TH: Tensor, ids_TK: Tensor, gate_TK: Tensor
    ) -> Tensor:
        slots_GC = context.tables.slots_PLGC[context.phase][self.layer]
        if context.capacity is not None:
            ids_TK, gate_TK = self._limited(context, context.capacity, ids_TK, gate_TK, slots_GC)
        experts = context.stores[self.layer]
        mine_C = slots_GC[context.exchange.rank].astype(np.int64)
        sent = context.dispatch.assign(self.layer, context.phase, context.step, ids_TK)
        quota_GS = sent.quota_GS
        assignment_A, _, row_TK = sort_by_slot(sent.slot_TK, slots_GC.size)
        physical_C = experts.physical(mine_C)
        rows, receipt, remote = send_tokens(
            context.exchange, x_TH.cpu(), assignment_A, ids_TK.shape[1], quota_GS, physical_C,
            payload=context.payload,
        )
        rows = rows.to(x_TH.device)
        count_P = self._count(quota_GS, context.exchange, physical_C, experts.capacity)
        clock = _ExpertClock(x_TH.device)
        y_AH = experts.compute(rows, count_P)
        measures = context.measures
        measures.expert_cpu_us_L[self.layer] += clock.stop_us()
        measures.tokens_L[self.layer] += len(rows)
        measures.remote_transfers_L[self.layer] += remote
        measures.peak_L[self.layer] = _busiest_expert(quota_GS, slots_GC)
        home_AH = return_tokens(context.exchange, y_AH.cpu(), receipt).to(x_TH.device)
        return combine_rows(home_AH, row_TK.to(x_TH.device), gate_TK.to(x_TH.device))

    def _limited(
        self,
        context: RankContext,
        rule: CapacityRule,
        ids_TK: Tensor,
        gate_TK: Tensor,
        slots_GC: npt.NDArray[np.int16],
    ) -> tuple[Tensor, Tensor]:
        score_TE = None if self._scores is None else self._scores.scaled(ids_TK, gate_TK)
        limited = token_limit.limit(
            context.exchange, rule, ids_TK, gate_TK, score_TE, slots_GC,
            context.tables.num_experts,
        )
        context.measures.dropped_L[self.layer] += limited.dropped
        return limited.ids_TK, limited.gates_TK

    @staticmethod
    def _count(
        quota_GS: npt.NDArray[np.int32],
        exchange: Exchange,
        physical_C: npt.NDArray[np.int64],
        capacity: int,
    ) -> npt.NDArray[np.int64]:
        """Rows that reach each physical slot of this rank."""
        slots = len(physical_C)
        mine = quota_GS.sum(axis=0)[exchange.rank * slots : (exchange.rank + 1) * slots]
        return np.bincount(physical_C, weights=mine, minlength=capacity).astype(np.int64)

    def _replayed(self, replay: RoutingOverride, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        replay.own_ids_LTK[self.layer] = ids_TK
        return replay.ids_LTK[self.layer], replay.gates_LTK[self.layer]


def _busiest_expert(quota_GS: npt.NDArray[np.int32], slots_GC: npt.NDArray[np.int16]) -> int:
    """Most assignments of one expert, over all its slots and all ranks."""
    tokens_S, expert_S = quota_GS.sum(axis=0), slots_GC.reshape(-1)
    held = expert_S >= 0
    return int(np.bincount(expert_S[held], weights=tokens_S[held]).max())


def attach(
    model: Any,
    expert_modules: list[str],
    context: Callable[[], RankContext],
    rule: CapacityRule | None,
    where: str,
) -> None:
    """Hang a layer on each experts module; from then on the model computes through the exchange."""
    for layer, name in enumerate(expert_modules):
        reroutes = rule is not None and rule.rule == "reroute"
        scores = token_limit.RouterScores(model, name, where) if reroutes else None
        model.get_submodule(name).loadmaster_layer = ExpertLayer(layer, context, scores)


def register() -> None:
    """Make the implementation known to transformers; safe to call again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, loadmaster_experts)


def loadmaster_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts interface: hidden [T, H], chosen experts [T, K], weights [T, K]."""
    layer = getattr(module, "loadmaster_layer", None)
    if layer is None:
        raise LoadmasterError("this experts module belongs to no rank: load it with workers.rank")
    out: Tensor = layer.forward(hidden_states, top_k_index, top_k_weights)
    return out
