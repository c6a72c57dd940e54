"""Recorder: what a serving process calls to keep the routing of its steps.

Called once per step and layer by live workers, so it only copies into buffers made beforehand; a
full buffer goes to a writer thread. Expects **logical** expert ids: physical slots change meaning
with every plan. Warm-up and dummy passes are dropped. An error while writing ends the recording,
not the server: what was committed stays, and `failure` says why. Knows nothing of models' weights,
of the exchange between ranks, or of plans.

Routing leaks content; with requests=False nothing says which tokens belong together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import InputError, UsageError
from ..merge import UNLABELLED, concatenate, without_unlabelled
from ..model_spec import ModelSpec
from ..storage.manifest import MANIFEST_NAME, Manifest, create_manifest
from ..storage.store import SHARD_TOKENS, TraceWriter, open_trace
from ..trace import PHASES, RoutingTrace
from .token_buffer import BackgroundWriter, TokenBuffer

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class RecordingSummary:
    """What a recording holds, and why it ended early if it did."""

    tokens: int             # recorded, less those lost
    steps: int
    dummy_steps: int        # warm-up and padding passes, dropped
    abandoned_steps: int    # begun but not completed, dropped
    lost_tokens: int        # could not be written, or came after the failure
    failure: str | None


@dataclass
class _OpenStep:
    tokens: int
    kept: bool
    layers: set[int] = field(default_factory=set)


class Recorder:
    """Records the routing of one rank, to a folder or in memory.

        begin_step(…)                          the tokens of this forward pass
        layer(0, ids) … layer(L - 1, ids)      in any order
        end_step()                             from here on the step counts
    """

    def __init__(
        self,
        directory: Path | str | None,
        model: ModelSpec,
        *,
        rank: int = 0,
        ranks: int = 1,
        gates: bool = False,
        requests: bool = True,
        home_ranks: bool = True,
        domain_names: tuple[str, ...] = (),
        buffer_tokens: int = SHARD_TOKENS,
        plan_at_capture: str | None = None,
        resume: bool = False,
    ) -> None:
        """directory: a new folder, or the one another rank of this recording began; None: memory.
        ranks: how many recorders share it. gates: keep gate weights. requests: keep which request
        a token belongs to. home_ranks: keep which rank a token came from; not where one process
        acts as a cluster. resume: go on after this rank's last shard (a restarted worker).

        `domain_names` may be set again later, to a longer list with the same beginning.
        Raises UsageError where the folder holds something else or on bad numbers.
        """
        if buffer_tokens < 1 or not 0 <= rank < ranks:
            raise UsageError(
                f"a recorder needs buffer_tokens >= 1 and 0 <= rank < ranks; got {buffer_tokens}, "
                f"rank {rank} of {ranks}"
            )
        wanted = {"source": home_ranks, "request": requests, "gates": gates}
        columns = ("step", "phase", "domain", *(name for name, keep in wanted.items() if keep))
        self.model, self.rank, self.domain_names = model, rank, tuple(domain_names)
        self._manifest = Manifest.of_model(
            model, columns=columns, ranks=ranks, plan_at_capture=plan_at_capture
        )
        self._buffer = TokenBuffer(self._manifest, buffer_tokens)
        self._full: list[RoutingTrace] = []  # whole buffers, when recording to memory
        self._folder = None if directory is None else Path(directory)
        self._background: BackgroundWriter | None = None
        if self._folder is not None:
            writer = _join_recording(self._folder, self._manifest, rank, resume)
            self._background = BackgroundWriter(writer)
            self._spare = TokenBuffer(self._manifest, buffer_tokens)
        self._step: _OpenStep | None = None
        self._tokens = self._steps = self._dummy_steps = self._abandoned_steps = 0
        self._refused_tokens = 0
        self._given = 0     # tokens, in the order stored, that were asked for as new ones
        self._closed = False

    @property
    def failure(self) -> str | None:
        """Why recording stopped; None while it works."""
        return None if self._background is None else self._background.failure

    @property
    def trouble(self) -> str | None:
        """What keeps tokens from the disk: a failure for good, or a folder that refuses now."""
        if self._background is None or self._closed:
            return None
        if self.failure is not None:
            return f"{self.failure}; nothing more is recorded"
        refusal = self._background.refusal
        return refusal and (
            f"{refusal}; what is recorded waits in memory, and is lost unless that changes"
        )

    def begin_step(
        self,
        step: int,
        request_T: npt.ArrayLike,
        phase_T: npt.ArrayLike | Phase = "decode",
        domain_T: npt.ArrayLike | None = None,
        source: int | npt.ArrayLike | None = None,
        dummy: bool = False,
    ) -> None:
        """Announce the tokens of the next forward pass.

        request_T: [T] request of each token; its length is T, also where requests are not kept.
        phase_T: one name, or [T] of PREFILL and DECODE. domain_T: [T] indices into domain_names
        (-1: no label).
        source: home rank, by default this recorder's. dummy: a warm-up or padding pass.
        A step that was begun and never ended (an aborted pass) is dropped here.
        Raises UsageError on a domain without a name, or after `close`.
        """
        if self._closed:
            raise UsageError("this recorder is closed: make a new one, with resume=True to go on")
        self._abandon()
        request = np.asarray(request_T)
        kept = not dummy and self.failure is None
        self._step = _OpenStep(len(request), kept)
        if not kept:
            self._dummy_steps += dummy
            self._refused_tokens += 0 if dummy else len(request)
            return
        self._evict(len(request))
        columns, at = self._buffer.columns, self._rows(len(request))
        columns["step"][at] = step
        if "source" in columns:
            columns["source"][at] = self.rank if source is None else source
        columns["phase"][at] = PHASES.index(phase_T) if isinstance(phase_T, str) else phase_T
        columns["domain"][at] = 0 if domain_T is None else self._labels(np.asarray(domain_T))
        if "request" in columns:
            columns["request"][at] = request

    def layer(self, layer: int, ids_TK: Any, gates_TK: Any = None) -> None:
        """Record one MoE layer (counted from 0) of the open step: its tokens' logical experts.

        ids_TK, gates_TK: [T, K] numpy arrays or torch tensors of any integer or float type.
        Raises UsageError outside a step, on a wrong shape or without the gates this recorder
        keeps; InputError on an id that is no expert or a gate that is no number. The step is then
        dropped.
        """
        if self._step is None:
            raise UsageError("Recorder.layer was called outside begin_step … end_step")
        if not self._step.kept:
            return
        try:
            self._store(layer, _as_numpy(ids_TK), gates_TK)
        except (InputError, UsageError):
            self._abandon()
            raise
        self._step.layers.add(layer)

    def end_step(self) -> None:
        """The step is complete and counts; one that lacks layers (an aborted pass) is dropped."""
        step = self._step
        if step is None:
            raise UsageError("Recorder.end_step was called without begin_step")
        if step.kept and len(step.layers) < self._manifest.num_layers:
            self._abandon()
            return
        self._step = None
        if step.kept:
            self._buffer.used += step.tokens
            self._tokens += step.tokens
            self._steps += 1

    def trace(self, *, new: bool = False) -> RoutingTrace:
        """Everything recorded so far by this rank, up to the last whole step, in memory.

        new: only what came since it was last asked for so; a long recording is not read again.
        What could not be written after an error is not in it.
        """
        parts = list(self._full)
        skip = self._given if new else 0
        if self._folder is not None and self._background is not None:
            self._background.wait()
            stored = open_trace(self._folder, verify=False)
            ends = np.cumsum([shard.tokens for shard in stored.shards_of(self.rank)])
            whole = int(np.searchsorted(ends, skip, side="right"))     # shards given out entirely
            skip -= int(ends[whole - 1]) if whole else 0
            parts.append(stored.read_as_stored(rank=self.rank, skip_shards=whole))
        parts.append(self._buffer.as_trace(self._names(), copy=True))
        trace = concatenate(parts)
        if new:
            trace = trace.select(np.arange(skip, trace.num_tokens))
            self._given += trace.num_tokens
        return without_unlabelled(trace)

    def close(self) -> RecordingSummary:
        """Write what is left and say what was recorded. A disk error is in `failure`, not raised.

        Closing twice is harmless; recording after closing is not possible.
        """
        self._abandon()
        if self._background is not None and not self._closed:
            self._flush()
            self._background.close()
        self._closed = True
        return self.summary()

    def summary(self) -> RecordingSummary:
        """Counts up to now."""
        unwritten = 0 if self._background is None else self._background.lost_tokens
        return RecordingSummary(
            tokens=self._tokens - unwritten, steps=self._steps, dummy_steps=self._dummy_steps,
            abandoned_steps=self._abandoned_steps, lost_tokens=self._refused_tokens + unwritten,
            failure=self.failure,
        )

    def _store(self, layer: int, ids: npt.NDArray[Any], gates: Any) -> None:
        tokens = self._step.tokens if self._step else 0
        experts, shape = self._manifest.num_experts, (tokens, self._manifest.top_k)
        if not 0 <= layer < self._manifest.num_layers or ids.shape != shape:
            raise UsageError(
                f"layer {layer} of {self._manifest.num_layers}: ids have shape {list(ids.shape)}, "
                f"this step needs {list(shape)}"
            )
        # One pass checks both ends: a negative id read as unsigned is huge.
        if ids.size and int(ids.view(f"u{ids.itemsize}").max()) >= experts:
            raise InputError(
                f"layer {layer}: expert ids lie in [{ids.min()}, {ids.max()}], not in "
                f"[0, {experts}): record logical experts, not slots; the step was dropped"
            )
        self._buffer.ids_LTK[layer, self._rows(tokens)] = ids
        if self._buffer.gates_LTK is not None:
            if gates is None:
                raise UsageError(f"layer {layer}: this recorder keeps gates, none were given")
            into = self._buffer.gates_LTK[layer, self._rows(tokens)]
            with np.errstate(over="ignore", invalid="ignore"):  # found by the next line
                into[...] = _as_numpy(gates)
            if not np.isfinite(into).all():  # a stored NaN would make the trace unreadable
                raise InputError(
                    f"layer {layer}: gates hold NaN, infinity or more than float16 can; record "
                    "without gates; the step was dropped"
                )

    def _labels(self, domain_T: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Domains as stored: one higher, so that 0 is free for tokens without a label (-1)."""
        if domain_T.size and not -1 <= domain_T.min() <= domain_T.max() < len(self.domain_names):
            self._step = None
            raise UsageError(
                f"domains lie in [{domain_T.min()}, {domain_T.max()}], but "
                f"{len(self.domain_names)} have a name: set domain_names first"
            )
        return domain_T + 1

    def _rows(self, tokens: int) -> slice:
        return slice(self._buffer.used, self._buffer.used + tokens)

    def _names(self) -> tuple[str, ...]:
        """Names of the stored domain column, whose 0 means: came without a label."""
        return (UNLABELLED, *self.domain_names)

    def _abandon(self) -> None:
        if self._step is not None and self._step.kept:
            self._abandoned_steps += 1
        self._step = None

    def _evict(self, tokens: int) -> None:
        if self._buffer.used + tokens > self._buffer.capacity:
            self._flush()
        if tokens > self._buffer.capacity:  # a step larger than a buffer gets a larger one
            self._buffer = TokenBuffer(self._manifest, tokens)

    def _flush(self) -> None:
        """Hand the buffer over and go on with an empty one."""
        if self._buffer.used == 0:
            return
        if self._background is None:
            self._full.append(self._buffer.as_trace(self._names(), copy=True))
        else:
            self._background.hand_over(self._buffer, self._names())
            self._buffer, self._spare = self._spare, self._buffer
        self._buffer.used = 0


def _join_recording(
    folder: Path, manifest: Manifest, rank: int, resume: bool
) -> TraceWriter:
    """Begin the recording, or join the one that another rank began."""
    if not (folder / MANIFEST_NAME).exists():
        try:
            create_manifest(folder, manifest)
        except UsageError:
            if not (folder / MANIFEST_NAME).exists():  # else another rank was faster
                raise
    writer = TraceWriter(folder, rank, resume=resume)
    if not writer.manifest.same_recording(manifest):
        raise UsageError(
            f"{folder}: holds a trace of another model or with other columns; existing files are "
            "never overwritten, give a new folder"
        )
    return writer


def _as_numpy(values: Any) -> npt.NDArray[Any]:
    """The array itself, or a torch tensor's values on the host (bfloat16 has no numpy type)."""
    if isinstance(values, np.ndarray):
        return values
    tensor = values.detach().cpu()
    array: npt.NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array
