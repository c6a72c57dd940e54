"""One rank: its share of the requests, its share of the experts, one step at a time.

A plain class; `workers.launch` wraps it once as a Ray actor. Knows its model, caches, experts and
exchange. Knows nothing of queues, the other ranks' requests, or why a plan was chosen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import LoadmasterError, UsageError
from ...kernels.cpu.dense import make_rowwise
from ...traces.recording.recorder import Recorder, RecordingSummary
from ...traces.trace import RoutingTrace
from ..protocol.phase_plans import Tables
from ..protocol.settings import RankSettings, served_spec
from ..protocol.step_messages import Chunk, EpochMismatchError, StepResult, StepWork
from . import attention, expert_layer
from .attention import PackedStep, RequestCache
from .company_check import company_fault
from .dispatch import LiveDispatch
from .exchange import Exchange, Rendezvous
from .expert_layer import LayerMeasures, RankContext
from .expert_store import ExpertStore
from .model import DTYPES, MoeCheckpoint, fingerprint
from .staging import Staging
from .step_rows import greedy, last_rows, logits_by_request, own_ids, replay_of
from .weight_files import bytes_of

# Experts copied within memory after one step, to lie in one block again: a small part of a step.
GATHER_BYTES = 16 << 20

# transformers changes process-wide defaults while it builds a model; ranks may be threads.
_BUILDING = threading.Lock()

Fingerprints = dict[tuple[int, int], str]     # (layer, expert) -> sha256


@dataclass(frozen=True)
class RankState:
    """What a rank answers to a coordinator that does not know it yet."""

    settings: RankSettings
    epoch: int                    # 0: under no plan
    held_L: list[list[int]]
    step: int                     # the last one it began


@dataclass(frozen=True)
class Loaded:
    """What a rank learnt from its checkpoint."""

    vocabulary: int
    context_tokens: int
    experts_backend: str          # what computes the experts, `grouped.BACKENDS`
    notes: tuple[str, ...]        # what was refused here, and what is not promised; a line each


class Rank:
    """Serves its share of each step. One thread at a time."""

    def __init__(self, settings: RankSettings) -> None:
        """Nothing is read yet: `load` does."""
        torch.set_num_threads(1)
        self.settings = settings
        self._dtype = DTYPES[settings.dtype]
        self._device = torch.device(settings.device)
        self.model_spec = served_spec(settings.model_dir, settings.dtype)
        self._checkpoint: MoeCheckpoint
        self._loaded: Loaded | None = None
        self._stores: list[ExpertStore] = []
        self._caches: dict[int, RequestCache] = {}
        self._digests: dict[int, Any] = {}
        self._context: RankContext | None = None
        self._exchange: Exchange | None = None
        self._tables: Tables | None = None
        self._meeting: Rendezvous | None = None
        self._recorder: Recorder | None = None
        self._refused: RecordingSummary | None = None     # why there is none, and what that lost
        self._hidden_TH: Tensor = torch.empty(0)
        self._last_step = 0

    def load(self) -> Loaded:
        """Read the model without its expert_layer. Raises InputError when it cannot be served.

        Called again, nothing is read.
        """
        if self._loaded is not None:
            return self._loaded
        self._require_device()
        with _BUILDING:
            self._checkpoint = MoeCheckpoint(self.settings.model_dir)
            self._checkpoint.require_shape(self.model_spec)
            self._model = self._checkpoint.load_dense(self._dtype).to(self._device)
            dense = make_rowwise(self._model, attention.live_rows)
        attention.require_supported(self._model, self.settings.model_dir)
        notes = [*self._company_notes(), *dense.refused]
        expert_layer.attach(
            self._model, self._checkpoint.expert_modules, self._ready, self.settings.capacity,
            self.settings.model_dir,
        )
        self._model.base_model.register_forward_hook(self._keep_hidden)
        shape = self._checkpoint.shape
        self._stores = [
            ExpertStore(lambda slots: shape.allocate(slots, self._dtype, self._device))
            for _ in range(self.model_spec.num_layers)
        ]
        self._staging = Staging(self._stores, lambda: shape.empty_expert(self._dtype))
        weights = shape.allocate(1, self._dtype, self._device)
        self._loaded = Loaded(
            self._checkpoint.vocabulary, self._checkpoint.context_tokens, weights.backend,
            (*notes, *weights.refused),
        )
        return self._loaded

    def _company_notes(self) -> list[str]:
        """What this model's own code may do to a request's bits; no promise is made on a GPU."""
        if self._device.type != "cpu":
            return []
        fault = company_fault(
            self._model, self._checkpoint.expert_modules, self._checkpoint.vocabulary,
            (self.settings.model_dir, self.settings.dtype),
        )
        return [fault] if fault else []

    def _require_device(self) -> None:
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"rank {self.settings.rank}: no GPU can be seen from its process (torch "
                f"{torch.__version__}): install a CUDA build of torch on the ranks' nodes, or "
                "leave gpus_per_rank at 0"
            )

    # ---- life ------------------------------------------------------------------------------

    def host_meeting(self, host: str) -> int:
        """Open the store where the next group meets; returns its port."""
        self._meeting = Rendezvous.open(host)
        return self._meeting.port

    def meet(
        self, hosts: tuple[str, str], port: int, generation: str, timeout_s: float
    ) -> None:
        """Form a group with the other ranks; the one before is left for good.

        hosts: (where the store is, own address).
        """
        self.leave()
        if self._meeting is None or self._meeting.port != port:
            self._meeting = Rendezvous.find(hosts[0], port)
        self._exchange = Exchange.meet(
            self._meeting, generation, self.settings.rank, self.settings.ranks,
            timeout_s=timeout_s, host=hosts[1],
        )

    def renumber(self, settings: RankSettings) -> None:
        """Become another rank of a group of another size; what is held stays."""
        self.leave()
        self.settings = settings

    def forget_requests(self) -> None:
        """Drop the keys and values of all requests: they start again from their prompts."""
        self._caches.clear()
        self._digests.clear()

    def state(self) -> RankState:
        """Which rank this is, under which epoch, and what it holds."""
        epoch = 0 if self._tables is None else self._tables.epoch
        return RankState(self.settings, epoch, self.held(), self._last_step)

    def leave(self) -> None:
        """Leave the group, if in one."""
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = self._context = None

    @torch.inference_mode()      # as in a step: what is made there can be written only so
    def hold(self, experts_L: list[list[int]]) -> Fingerprints:
        """Read these experts of each layer from the checkpoint; what is held already stays.

        Returns the fingerprint of every expert read. Only these experts' tensors are read.
        """
        read: Fingerprints = {}
        for layer, wanted in enumerate(experts_L):
            missing = [e for e in wanted if not self._stores[layer].holds([e])]
            self._stores[layer].reserve(len(missing))
            for expert in missing:
                tensors = self._checkpoint.read_expert(layer, expert, self._dtype)
                read[layer, expert] = fingerprint(tensors)
                self._stores[layer].put(expert, tensors)
        return read

    def adopt(self, tables: Tables) -> None:
        """Serve under these tables from the next step on. Raises if an expert is not held."""
        for layer, wanted in enumerate(tables.experts_of(self.settings.rank)):
            if not self._stores[layer].holds(wanted):
                missing = sorted(set(wanted) - set(self._stores[layer].experts))
                raise LoadmasterError(
                    f"rank {self.settings.rank}: layer {layer} needs experts {missing}, which are "
                    "not held: stage them first"
                )
        self._tables = tables
        self._context = None

    # ---- plan switches ---------------------------------------------------------------------

    def verify(self, expected: Fingerprints) -> list[tuple[int, int]]:
        """Staged experts whose bytes went wrong since they arrived; they are thrown away."""
        return self._staging.verify(expected)

    def commit(self, tables: Tables) -> None:
        """Serve under these tables from the next step on, staged experts included."""
        self.adopt(tables)
        self._staging.commit()

    def abort(self) -> None:
        """Throw away whatever is staged."""
        self._staging.abort()

    def evict(self) -> int:
        """Drop experts that neither the active plans nor a switch under way need; how many."""
        if self._tables is None:
            return 0
        dropped = 0
        for layer, wanted in enumerate(self._tables.experts_of(self.settings.rank)):
            for expert in self._stores[layer].experts:
                if expert not in wanted and (layer, expert) not in self._staging.staged:
                    self._stores[layer].drop(expert)
                    dropped += 1
        return dropped

    def _gather(self) -> None:
        """Between switches, bring layers whose experts a switch scattered together again."""
        scattered = any(store.scattered_bytes for store in self._stores)
        if self._tables is None or self._staging.staged or not scattered:
            return
        budget = GATHER_BYTES
        wanted_L = self._tables.experts_of(self.settings.rank)
        for store, wanted in zip(self._stores, wanted_L, strict=True):
            # Others are about to be retired: gathered now, they would leave empty slots behind.
            if store.scattered_bytes and budget > 0 and store.experts == wanted:
                budget -= store.scattered_bytes
                store.gather()

    def fingerprints(self) -> Fingerprints:
        """The fingerprint of every expert in memory, computed now."""
        return {
            (layer, expert): fingerprint(store.get(expert))
            for layer, store in enumerate(self._stores)
            for expert in store.experts
        }

    def held(self) -> list[list[int]]:
        """Experts in memory, by layer."""
        return [store.experts for store in self._stores]

    # ---- a step ----------------------------------------------------------------------------

    def step(self, work: StepWork) -> StepResult:
        """Run one step together with all other ranks.

        On any error this rank leaves the group, so that its peers fail at once and do not wait.
        """
        try:
            return self._step(work)
        except BaseException:
            self.leave()
            raise

    @torch.inference_mode()
    def _step(self, work: StepWork) -> StepResult:
        wall, cpu = time.perf_counter_ns(), time.process_time_ns()
        self._last_step = work.step
        for request in work.release:
            self._caches.pop(request, None)
            self._digests.pop(request, None)
        committing = time.perf_counter_ns()
        if work.commit is not None:
            self.commit(work.commit)
        switched = time.perf_counter_ns()
        context = self._ready()
        if work.epoch != context.tables.epoch:
            raise EpochMismatchError(
                f"rank {self.settings.rank} is in epoch {context.tables.epoch}, the step asks for "
                f"{work.epoch}: nothing was computed"
            )
        layers = self.model_spec.num_layers
        context.step, context.phase = work.step, work.phase
        context.measures = LayerMeasures.zeros(layers)
        context.replay = replay_of(work.chunks, layers, self.model_spec.top_k)
        recorder = self._begin_recording(work)
        context.recorder = recorder
        rows = last_rows(work.chunks)
        logits, wanted = self._forward(work, rows)
        if recorder is not None:
            recorder.end_step()
        measures = context.measures
        moving = time.perf_counter_ns()
        staged, corrupted = self._staging.run(work.stage, context.exchange, work.expected)
        if work.evict:
            self.evict()
        self._gather()
        return StepResult(
            rank=self.settings.rank,
            step=work.step,
            epoch=work.epoch,
            next_token=greedy(logits[rows] if work.all_logits else logits, work.chunks),
            digest=self._digest(work) if work.digest else {},
            logits=logits_by_request(logits, work.chunks) if work.all_logits else {},
            own_ids=own_ids(context.replay, work.chunks),
            rows=wanted,
            expert_cpu_us_L=measures.expert_cpu_us_L,
            tokens_L=measures.tokens_L,
            remote_transfers_L=measures.remote_transfers_L,
            dropped_L=measures.dropped_L,
            peak_L=measures.peak_L,
            staged=tuple(staged),
            corrupted=tuple(corrupted),
            recording_trouble=self._recording_trouble(work),
            stage_us=(time.perf_counter_ns() - moving + switched - committing) / 1e3,
            cpu_us=(time.process_time_ns() - cpu) / 1e3,
            wall_us=(time.perf_counter_ns() - wall) / 1e3,
        )

    def _forward(self, work: StepWork, wanted_rows: Tensor) -> tuple[Tensor, int]:
        """Logits of these rows, or of all with `all_logits`; and how many rows the step had."""
        chunks = work.chunks
        packed = PackedStep(
            [len(c.tokens) for c in chunks], [self._cache(c) for c in chunks]
        )
        padding = packed.padded_rows - packed.rows
        tokens = np.concatenate([*(c.tokens for c in chunks), np.zeros(padding, np.int32)])
        positions = np.concatenate(
            [*(np.arange(c.start, c.start + len(c.tokens)) for c in chunks), np.zeros(padding)]
        )
        keep: Any = 0 if work.all_logits else wanted_rows.to(self._device)
        with attention.running(packed):
            out = self._model(
                input_ids=torch.from_numpy(tokens.astype(np.int64))[None].to(self._device),
                position_ids=torch.from_numpy(positions.astype(np.int64))[None].to(self._device),
                use_cache=False,
                logits_to_keep=keep,
            )
        packed.finish()
        return out.logits[0].cpu(), packed.rows

    def _cache(self, chunk: Chunk) -> RequestCache:
        if chunk.start == 0:
            self._caches[chunk.request] = RequestCache()
            self._digests[chunk.request] = hashlib.sha256()
        cache = self._caches.get(chunk.request)
        if cache is None or cache.length != chunk.start:
            held = "nothing" if cache is None else f"{cache.length} tokens"
            raise LoadmasterError(
                f"rank {self.settings.rank} holds {held} of request {chunk.request}, the step goes "
                f"on from {chunk.start}: send the request again from its prompt"
            )
        return cache

    def _ready(self) -> RankContext:
        if self._context is None:
            if self._exchange is None or self._tables is None:
                raise LoadmasterError(
                    f"rank {self.settings.rank} is in no group or under no plan: join and adopt"
                )
            self._context = RankContext(
                exchange=self._exchange,
                dispatch=LiveDispatch(self._exchange, self._tables, self.settings.cluster),
                tables=self._tables,
                stores=self._stores,
                payload=self.settings.cluster.traffic.payload,
                capacity=self.settings.capacity,
            )
        return self._context

    # ---- outputs ---------------------------------------------------------------------------

    def _keep_hidden(self, module: Any, inputs: Any, output: Any) -> None:
        self._hidden_TH = output.last_hidden_state[0]

    def _digest(self, work: StepWork) -> dict[int, str]:
        """Digest of every output row so far of each request in the step."""
        start = 0
        for chunk in work.chunks:
            rows = self._hidden_TH[start : start + len(chunk.tokens)]
            self._digests[chunk.request].update(bytes_of(rows))
            start += len(chunk.tokens)
        return {c.request: self._digests[c.request].hexdigest() for c in work.chunks}

    # ---- recording -------------------------------------------------------------------------

    def trace(self, *, take: bool = False) -> RoutingTrace | None:
        """What was recorded here so far; None when nothing was.

        take: only what came since it was last taken, and memory is freed.
        """
        if self._recorder is None:
            return None
        trace = self._recorder.trace(new=take)
        if take and self.settings.record_to is None:
            self._recorder = None
        return trace

    def close_recording(self) -> RecordingSummary | None:
        """Finish the files under `record_to`; says what was kept and what went wrong, if it did.

        Recording again goes on after them. None when nothing was recorded.
        """
        recorder, self._recorder = self._recorder, None
        refused, self._refused = self._refused, None
        if recorder is None:
            return refused
        self.settings = dataclasses.replace(
            self.settings, resume_recording=self.settings.record_to is not None
        )
        return recorder.close()

    def _open_recorder(self, work: StepWork) -> bool:
        """Whether there is a recorder now. Where its files cannot be begun, serving goes on, and
        `close_recording` says what was lost."""
        target = self.settings.record_to
        lost = 0 if self._refused is None else self._refused.lost_tokens
        failure = None if self._refused is None else self._refused.failure
        if failure is None:
            try:
                self._recorder = Recorder(
                    None if target is None else Path(target),
                    self.model_spec,
                    rank=self.settings.rank,
                    ranks=self.settings.ranks,
                    resume=self.settings.resume_recording,
                )
                return True
            except (LoadmasterError, OSError) as error:
                failure = str(error)
        lost += sum(len(chunk.tokens) for chunk in work.chunks)
        self._refused = RecordingSummary(0, 0, 0, 0, lost, failure)
        return False

    def _recording_trouble(self, work: StepWork) -> str:
        if not work.record:
            return ""
        refused = None if self._refused is None else self._refused.failure
        found = refused if self._recorder is None else self._recorder.trouble
        return found or ""

    def _begin_recording(self, work: StepWork) -> Recorder | None:
        if not work.record or not work.chunks:
            return None
        if self._recorder is None and not self._open_recorder(work):
            return None
        assert self._recorder is not None
        self._recorder.domain_names = work.domain_names
        sizes = [len(c.tokens) for c in work.chunks]

        def column(values: list[int], dtype: type) -> Any:
            return np.repeat(np.array(values, dtype), sizes)

        self._recorder.begin_step(
            work.step,
            column([c.request for c in work.chunks], np.int64),
            column([c.phase for c in work.chunks], np.uint8),
            domain_T=column([c.domain for c in work.chunks], np.int32),
            source=self.settings.rank,
        )
        return self._recorder
