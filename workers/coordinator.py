"""The one process that leads a group: takes requests, runs lock-step steps, switches plans.

Knows the scheduler, the plan in force, the journal of a switch, and ranks through a fleet. Knows
nothing of tensors. All state changes happen in one thread, at step boundaries; callers from other
threads hand in work and wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import LoadmasterError
from ..placement.plan import Plan
from ..traces.merge import concatenate, in_step_order
from ..traces.spec import ModelSpec
from ..traces.trace import RoutingTrace
from .fleet import Fleet
from .scheduler import Request, Scheduler, check_prompt
from .settings import GroupSettings
from .switch import ApplyReport, PlanSwitch, check_plan
from .tables import Tables
from .work import Chunk, ReplayedRouting, StepResult, StepWork

Answer = TypeVar("Answer")
_KEPT_STEPS = 4096
_START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class RequestState:
    """What a caller sees of a request. `tokens` are those from position `since` on."""

    number: int
    tokens: tuple[int, ...]
    since: int
    done: bool
    error: str
    digest: str
    retries: int


@dataclass(frozen=True)
class Measurements:
    """Figures of the last steps (at most 4,096 are kept). W steps, L layers, G ranks.

    expert_cpu_us is CPU time of the thread that ran the experts; the critical path of a step is
    expert_cpu_us.max(axis=2).sum(axis=1).
    """

    step: npt.NDArray[np.int64]                  # [W]
    epoch: npt.NDArray[np.int64]                 # [W]
    rows: npt.NDArray[np.int64]                  # [W, G] rows that were not padding
    expert_cpu_us: npt.NDArray[np.float64]       # [W, L, G]
    tokens: npt.NDArray[np.int64]                # [W, L, G] rows computed
    remote_copies: npt.NDArray[np.int64]         # [W, L, G] rows sent to other ranks
    step_wall_us: npt.NDArray[np.float64]        # [W] seen by the coordinator
    step_cpu_us: npt.NDArray[np.float64]         # [W, G]
    stage_us: npt.NDArray[np.float64]            # [W, G] spent on moving experts

    def take(self, steps: npt.NDArray[np.int64]) -> Measurements:
        """Only these steps, by position."""
        return Measurements(**{name: column[steps] for name, column in vars(self).items()})


class Coordinator:
    """Leads one group. Public methods may be called from any thread, but `start` comes first."""

    def __init__(self, settings: GroupSettings, fleet: Fleet) -> None:
        self.settings = settings
        self._fleet = fleet
        self._scheduler = Scheduler(len(settings.ranks), settings.limits)
        self._requests: dict[int, Request] = {}
        self._numbers = 0
        self._domain_names: list[str] = []
        self._plan = settings.plan
        self._epoch = 1
        self._step = 0
        self._generation = 0
        self._vocabulary = self._context_tokens = 0
        self._recording = False
        self._digests = False
        self._all_logits = False
        self._fingerprints: dict[tuple[int, int], str] = {}
        self._kept: deque[tuple[list[StepResult], float]] = deque(maxlen=_KEPT_STEPS)
        self._logits: dict[int, list[Any]] = {}
        self._own_ids: dict[int, list[Any]] = {}
        self._switch: PlanSwitch | None = None
        self._changed = threading.Condition()
        self._boundary: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._broken = ""

    # ---- life ------------------------------------------------------------------------------

    def start(self) -> ModelSpec:
        """Start the ranks, load what the plan gives each, form the group, begin to serve."""
        self._fleet.start(self.settings.ranks, _START_TIMEOUT_S)
        loaded = self._all("load")[0]
        self._vocabulary, self._context_tokens = loaded.vocabulary, loaded.context_tokens
        tables = Tables.of(self._plan, self._epoch)
        answers = [
            self._fleet.call(g, "hold", tables.experts_of(g)) for g in range(self._fleet.ranks)
        ]
        for read in self._fleet.gather(answers, _START_TIMEOUT_S):
            self._fingerprints.update(read)
        self._form_group()
        self._all("adopt", tables)
        self._thread = threading.Thread(target=self._serve, name="serve", daemon=True)
        self._thread.start()
        return self.model_spec

    def _form_group(self) -> None:
        """All ranks meet at a fresh port under the next generation."""
        self._generation += 1
        hosts = self._fleet.hosts()
        (port,) = self._fleet.gather(
            [self._fleet.call(0, "host_meeting", hosts[0])], _START_TIMEOUT_S
        )
        answers = [
            self._fleet.call(
                g, "meet", (hosts[0], host), port, self._generation, self.settings.step_timeout_s
            )
            for g, host in enumerate(hosts)
        ]
        self._fleet.gather(answers, _START_TIMEOUT_S)

    def stop(self) -> None:
        """Finish the step that runs, end the ranks. Requests not done fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self.settings.step_timeout_s)
        if not self._broken:
            self._fleet.gather(self._fleet.call_all("close_recording"), _START_TIMEOUT_S)
        self._fail_all("the group was stopped")
        self._fleet.end()

    @property
    def model_spec(self) -> ModelSpec:
        return self.settings.model_spec

    # ---- requests --------------------------------------------------------------------------

    def submit(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int,
        domains: Sequence[str] | None = None,
        stop_tokens: Sequence[int] = (),
        replays: Sequence[ReplayedRouting] | None = None,
    ) -> list[int]:
        """Take requests; returns their numbers. Raises InputError, and takes none, on a bad one."""
        checked = [
            check_prompt(p, max_new_tokens, self._vocabulary, self._context_tokens)
            for p in prompts
        ]
        with self._changed:
            self._require_serving()
            requests = []
            for i, prompt in enumerate(checked):
                domain = -1 if domains is None else self._domain(domains[i])
                request = Request(self._numbers, prompt, max_new_tokens, domain)
                request.stop_tokens = frozenset(stop_tokens)
                request.replay = None if replays is None else replays[i]
                self._requests[request.number] = request
                self._numbers += 1
                requests.append(request)
            self._scheduler.add(requests)
            self._changed.notify_all()
        return [r.number for r in requests]

    def wait(self, since: dict[int, int], timeout_s: float = 10.0) -> list[RequestState]:
        """News of these requests: waits until one has tokens past `since[number]` or is done.

        Returns the state of all of them; those without news too, when time is up.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                states = [self._state(n, at) for n, at in since.items()]
                left = deadline - time.monotonic()
                if any(s.done or s.tokens for s in states) or left <= 0:
                    return states
                self._changed.wait(left)

    def wait_all(self, numbers: Sequence[int], timeout_s: float = 10.0) -> list[RequestState]:
        """The states of these requests once all are done, or when time is up."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not all(self._requests[n].done for n in numbers):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return [self._state(n, 0) for n in numbers]

    def forget(self, numbers: Sequence[int]) -> None:
        """The caller has all it wants of these requests; those still running are cancelled."""

        def drop() -> None:
            for number in numbers:
                request = self._requests.pop(number, None)
                if request is not None and not request.done:
                    self._scheduler.cancel(number)
                self._logits.pop(number, None)
                self._own_ids.pop(number, None)

        self._at_boundary(drop)

    def logits(self, number: int) -> tuple[Any, Any]:
        """(logits [rows, V], own routing [L, rows, K] or None) of a request run with all logits."""
        with self._changed:
            own = self._own_ids.get(number)
            return np.concatenate(self._logits[number]), own and np.concatenate(own, axis=1)

    # ---- what is measured ------------------------------------------------------------------

    def configure(
        self,
        *,
        recording: bool | None = None,
        digests: bool | None = None,
        all_logits: bool | None = None,
        step_tokens: int | None = None,
    ) -> None:
        """Change these from the next step on; None leaves one as it is."""

        def change() -> None:
            self._recording = self._recording if recording is None else recording
            self._digests = self._digests if digests is None else digests
            self._all_logits = self._all_logits if all_logits is None else all_logits
            if step_tokens is not None:
                self._scheduler.set_step_tokens(step_tokens)

        self._at_boundary(change)

    def trace(self, take: bool = False) -> RoutingTrace | None:
        """Everything recorded on all ranks, in step order; None when nothing was."""
        parts = self._at_boundary(lambda: self._all_with("trace", take=take))
        traces = [t for t in parts if t is not None]
        return in_step_order(concatenate(traces)) if traces else None

    def measurements(self, after_step: int = 0) -> Measurements:
        """Figures of the steps after `after_step` (steps count from 1), as far as they are kept."""
        with self._changed:
            kept = [k for k in self._kept if k[0][0].step > after_step]
        results = [r for r, _ in kept]

        def stack(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
            rows = [[getattr(r, name) for r in ranks] for ranks in results]
            return np.array(rows, dtype).reshape(len(rows), self._fleet.ranks, *shape)

        layers = self.model_spec.num_layers
        per_layer = {
            name: stack(f"{name}_L", (layers,), dtype).transpose(0, 2, 1)
            for name, dtype in (
                ("expert_cpu_us", np.float64), ("tokens", np.int64), ("remote_copies", np.int64)
            )
        }
        return Measurements(
            step=np.array([r[0].step for r in results], np.int64),
            epoch=np.array([r[0].epoch for r in results], np.int64),
            rows=stack("rows", (), np.int64),
            step_wall_us=np.array([wall for _, wall in kept], np.float64),
            step_cpu_us=stack("cpu_us", (), np.float64),
            stage_us=stack("stage_us", (), np.float64),
            **per_layer,
        )

    # ---- plans -----------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What is in force: plan, epoch, step, requests in flight, rank process ids."""
        with self._changed:
            return {
                "plan": self._plan,
                "epoch": self._epoch,
                "step": self._step,
                "requests": len(self._scheduler.requests),
                "pids": self._fleet.pids,
                "broken": self._broken,
                "model_spec": self.model_spec,
            }

    def apply(self, plan: Plan, timeout_s: float = 600.0) -> ApplyReport:
        """Move to another plan while serving: stage, verify, commit. One at a time.

        Raises PlanError for a plan that does not fit, before anything moves; LoadmasterError when
        staging failed: then the old plan is in force as before.
        """
        future: Future[ApplyReport] = Future()

        def begin() -> None:
            if self._switch is not None:
                raise LoadmasterError("another plan is being applied: wait for it to end")
            check_plan(plan, self._plan, self.model_spec)
            held = self._all("held")
            self._switch = PlanSwitch(
                plan, held, self._fingerprints, self._epoch + 1, self.model_spec,
                self.settings.stage_budget_bytes, future,
            )

        self._at_boundary(begin)
        return future.result(timeout_s)

    # ---- the serving thread ----------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._has_work()):
                    self._changed.wait()
                if self._stopping:
                    return
            try:
                self._run_boundary()
                self._run_step()
            except LoadmasterError as error:
                self._break(str(error))
                return
            except Exception as error:
                self._break(f"{type(error).__name__}: {error}")
                return

    def _has_work(self) -> bool:
        return bool(self._boundary) or not self._scheduler.idle or self._switch is not None

    def _run_boundary(self) -> None:
        while True:
            with self._changed:
                if not self._boundary:
                    return
                work, future = self._boundary.popleft()
            try:
                future.set_result(work())
            except LoadmasterError as error:
                future.set_exception(error)

    def _run_step(self) -> None:
        with self._changed:
            chunks_G = self._scheduler.next_step()
            release_G = self._scheduler.take_release()
        if not any(chunks_G) and self._switch is None:
            return
        switch = self._switch
        stage = switch.next_stage() if switch is not None else ()
        commit = switch.ready_to_commit() if switch is not None else None
        self._step += 1
        epoch = commit.epoch if commit is not None else self._epoch
        works = [
            StepWork(
                step=self._step,
                epoch=epoch,
                chunks=chunks,
                release=release,
                record=self._recording,
                domain_names=tuple(self._domain_names),
                digest=self._digests,
                all_logits=self._all_logits,
                stage=stage,
                expected=switch.expected if switch is not None else {},
                commit=commit,
                retire=commit is not None,
            )
            for chunks, release in zip(chunks_G, release_G, strict=True)
        ]
        began = time.perf_counter()
        answers = [self._fleet.call(g, "step", work) for g, work in enumerate(works)]
        results: list[StepResult] = self._fleet.gather(answers, self.settings.step_timeout_s)
        wall_us = (time.perf_counter() - began) * 1e6
        self._finish_step(chunks_G, results, wall_us)
        if switch is not None:
            self._advance_switch(switch, commit, results, wall_us)

    def _finish_step(
        self, chunks_G: list[tuple[Chunk, ...]], results: list[StepResult], wall_us: float
    ) -> None:
        with self._changed:
            self._scheduler.finish_step(chunks_G, results)
            if any(chunks_G):
                self._kept.append(([_without_outputs(r) for r in results], wall_us))
            for result in results:
                for number, logits in result.logits.items():
                    self._logits.setdefault(number, []).append(logits)
                for number, ids in result.own_ids.items():
                    self._own_ids.setdefault(number, []).append(ids)
            self._changed.notify_all()

    def _advance_switch(
        self,
        switch: PlanSwitch,
        commit: Tables | None,
        results: list[StepResult],
        wall_us: float,
    ) -> None:
        if commit is not None:
            with self._changed:
                self._plan, self._epoch = switch.plan, commit.epoch
            self._switch = None
            switch.committed(wall_us)
            return
        switch.note(results, wall_us)
        if switch.failed:
            self._all("abort")
            self._switch = None
            switch.aborted()

    # ---- small things ----------------------------------------------------------------------

    def _at_boundary(self, work: Callable[[], Answer]) -> Answer:
        """Run `work` in the serving thread between two steps."""
        future: Future[Answer] = Future()
        with self._changed:
            self._require_serving()
            self._boundary.append((work, future))
            self._changed.notify_all()
        return future.result(_START_TIMEOUT_S)

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._fleet.gather(self._fleet.call_all(method, *args), _START_TIMEOUT_S)

    def _all_with(self, method: str, **options: Any) -> list[Any]:
        answers = [self._fleet.call(g, method, **options) for g in range(self._fleet.ranks)]
        return self._fleet.gather(answers, _START_TIMEOUT_S)

    def _domain(self, name: str) -> int:
        if name not in self._domain_names:
            self._domain_names.append(name)
        return self._domain_names.index(name)

    def _state(self, number: int, since: int) -> RequestState:
        if number not in self._requests:
            raise LoadmasterError(f"no request {number}: it was never taken, or is forgotten")
        request = self._requests[number]
        return RequestState(
            number, tuple(request.produced[since:]), since, request.done, request.error,
            request.digest, request.retries,
        )

    def _require_serving(self) -> None:
        if self._broken:
            raise LoadmasterError(f"the group does not serve any more: {self._broken}")
        if self._stopping or self._thread is None:
            raise LoadmasterError("the group is not serving: start it")

    def _break(self, reason: str) -> None:
        with self._changed:
            self._broken = reason
        self._fail_all(reason)

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            for request in self._scheduler.requests:
                request.fail(f"request {request.number} failed: {reason}")
            while self._boundary:
                self._boundary.popleft()[1].set_exception(LoadmasterError(reason))
            if self._switch is not None:
                self._switch.aborted(reason)
                self._switch = None
            self._changed.notify_all()


def _without_outputs(result: StepResult) -> StepResult:
    import dataclasses

    return dataclasses.replace(result, next_token={}, digest={}, logits={}, own_ids={})
