"""The one process that leads a group: takes requests, runs lock-step steps, switches plans.

Knows the scheduler, what is active (`active_plans`), and ranks through a fleet. Knows nothing of
tensors or Ray. All state changes happen in one thread, at step boundaries; callers from other
threads hand in work and wait. What happens when ranks die is in `recovery`.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ...errors import LoadmasterError
from ...placement.plan import Plan, PlanError
from ...traces.merge import concatenate, in_step_order
from ...traces.model_spec import ModelSpec
from ...traces.recording.recorder import RecordingSummary
from ...traces.trace import DECODE, PREFILL, RoutingTrace
from ..fleet.fleet import Fleet, OverdueError, RankLostError
from ..fleet.heartbeat import ANSWER_S, QUICK_ANSWER_S, gather_watched, silent_for_certain
from ..protocol.phase_plans import PhasePlans, Tables
from ..protocol.plan_switch import ApplyReport
from ..protocol.settings import GroupSettings
from ..protocol.step_messages import Chunk, ExchangeError, ReplayedRouting, StepResult, StepWork
from ..protocol.transfers import Round
from .active_plans import ActivePlans
from .journal import Journal, Switches
from .metrics import NO_METRICS, Metrics
from .recovery import Recovered, WorkerSet
from .request_registry import RequestBook, RequestState
from .scheduler import Scheduler
from .step_boundary import Answer, Boundary
from .step_log import Measurements, StepLog

IDLE_S = 0.8               # how often an idle group's ranks are asked for signs of life
_CAUSE_S = 0.8             # what ranks get to tell why a step failed
_FAILURES_IN_A_ROW = 3
_REBUILDS = 3              # attempts to serve again after one failure
_NUMBERS_PER_LIFE = 10**9


class Coordinator:
    """Leads one group. Public methods may be called from any thread, but `start` comes first."""

    def __init__(
        self, settings: GroupSettings, fleet: Fleet, metrics: Metrics = NO_METRICS
    ) -> None:
        self.settings = settings
        self._fleet = fleet
        self._metrics = metrics
        self._journal = Journal(settings.journal)
        self._workers = WorkerSet(settings, fleet, self._journal.try_resize)
        self._scheduler = Scheduler(len(settings.ranks), settings.limits)
        self._changed = threading.Condition()
        self._book = RequestBook(self._changed, self._journal.begin_life() * _NUMBERS_PER_LIFE)
        self._log = StepLog(settings.model_spec.num_layers)
        self._active = ActivePlans(settings, self._workers, self._journal, self._changed)
        self._step = 0
        self._last_phase = DECODE
        self._switches = Switches(step_tokens=settings.limits.step_tokens)
        self._recoveries: list[Recovered] = []
        self._recording_trouble = ""
        self._failures = 0
        self._boundary = Boundary(self._changed)
        self._stopping = False
        self._broken = ""
        self._thread: threading.Thread | None = None

    # ---- life ------------------------------------------------------------------------------

    def start(self) -> ModelSpec:
        """Start the ranks, load what the plan gives each, form the group, begin to serve."""
        self._workers.start_all(Tables.of(self._active.plans, self._active.epoch))
        return self._begin()

    def resume(self) -> ModelSpec:
        """Take over the ranks of a coordinator that died: finish or undo what it had begun.

        Lost ranks are replaced, or done without. Where that cannot be, `status` says why.
        """
        state = self._journal.read()
        self._active.resume(state)
        self._switch_to(state.switches)
        self._book.domain_names = list(state.switches.domains)
        try:
            began = time.time()
            lost, self._step = self._workers.take_over(self._active.plans)
            recovered = self._rebuilt(lost, "the coordinator was replaced")
            self._reform(recovered)
            if lost:
                self._recoveries.append(recovered.timed(began))
        except Exception as error:
            self._break(f"a new coordinator could not take the ranks over: {error}")
            return self.model_spec
        return self._begin()

    def _begin(self) -> ModelSpec:
        loaded = self._workers.loaded
        self._book.vocabulary = loaded.vocabulary
        self._book.context_tokens = loaded.context_tokens
        self._thread = threading.Thread(target=self._serve, name="serve", daemon=True)
        self._thread.start()
        return self.model_spec

    def stop(self) -> None:
        """Finish the step that runs, end the ranks. Requests not done fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self.settings.step_timeout_s)
            self._thread = None
            if not self._broken:
                self._workers.all("close_recording")
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
        with self._changed:
            self._require_serving()
            taken = self._book.take(prompts, max_new_tokens, domains, stop_tokens, replays)
            self._note_domains()
            self._scheduler.add(taken)
            self._changed.notify_all()
        return [r.number for r in taken]

    def wait(self, since: dict[int, int], timeout_s: float = 10.0) -> list[RequestState]:
        """News of these requests: see `RequestBook.wait`."""
        return self._book.wait(since, timeout_s)

    def wait_all(self, numbers: Sequence[int], timeout_s: float = 10.0) -> list[RequestState]:
        """These requests once all are done, or when time is up."""
        return self._book.wait_all(numbers, timeout_s)

    def forget(self, numbers: Sequence[int]) -> None:
        """The caller has all it needs of these requests; those still running are cancelled."""
        with self._changed:
            for number in numbers:
                if self._book.forget(number):
                    self._scheduler.cancel(number)

    def logits(self, number: int) -> tuple[Any, Any]:
        """Logits and own routing of a request that ran with all logits."""
        return self._book.logits(number)

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

        given = {
            "recording": recording, "digests": digests, "all_logits": all_logits,
            "step_tokens": step_tokens,
        }
        wanted = {name: value for name, value in given.items() if value is not None}

        def change() -> None:
            switches = dataclasses.replace(self._switches, **wanted)  # type: ignore[arg-type]
            if switches != self._switches:
                self._journal.try_switch(switches)
                self._switch_to(switches)

        self._at_boundary(change)

    def _switch_to(self, switches: Switches) -> None:
        self._switches = switches
        if switches.step_tokens is not None:
            self._scheduler.set_step_tokens(switches.step_tokens)

    def _note_domains(self) -> None:
        """A successor must number domains as this one does: recordings hold the numbers."""
        names = tuple(self._book.domain_names)
        if names != self._switches.domains:
            self._switches = dataclasses.replace(self._switches, domains=names)
            self._journal.try_switch(self._switches)

    def trace(self, take: bool = False) -> RoutingTrace | None:
        """Everything recorded on all ranks, in step order; None when nothing was."""
        parts = self._at_boundary(lambda: self._workers.all("trace", take=take))
        traces = [t for t in parts if t is not None]
        return in_step_order(concatenate(traces)) if traces else None

    def end_recording(self) -> list[RecordingSummary]:
        """Stop recording and finish the files; what each rank kept, and what it lost and why."""

        def end() -> list[RecordingSummary]:
            self._switches = dataclasses.replace(self._switches, recording=False)
            self._journal.try_switch(self._switches)
            return [s for s in self._workers.all("close_recording") if s is not None]

        return self._at_boundary(end)

    def measurements(self, after_step: int = 0) -> Measurements:
        """Figures of the steps after `after_step` (steps count from 1), as far as they are kept."""
        with self._changed:
            return self._log.after(after_step)

    def status(self) -> dict[str, Any]:
        """What is active, how far the group is, and what befell it."""
        with self._changed:
            return {
                "plan": self._active.plans.prefill,
                "decode_plan": self._active.plans.decode,
                "epoch": self._active.epoch,
                "step": self._step,
                "requests": len(self._scheduler.requests),
                "step_tokens": self._scheduler.limits.step_tokens,
                "recording": self._switches.recording,
                "recording_trouble": self._recording_trouble,
                "switching": self._active.switching,
                "committing": self._active.committing,
                "pids": self._fleet.pids,
                "recoveries": list(self._recoveries),
                "broken": self._broken,
                "model_spec": self.model_spec,
                "model_dir": self.settings.ranks[0].model_dir,
                "device": self.settings.ranks[0].device,
                "cluster": self._workers.cluster,
                "experts_backend": self._workers.experts_backend,
                "notes": self._workers.notes,
            }

    # ---- plans -----------------------------------------------------------------------------

    def apply(
        self, plan: Plan, decode: Plan | None = None, epoch: int | None = None,
        timeout_s: float = 600.0,
    ) -> ApplyReport:
        """Move to another plan while serving: stage, verify, commit. Applies wait for each other.

        decode: a plan of its own for new tokens. epoch: the one the caller decided under; another
        active one by now is an error. Raises PlanError for a plan that does not fit, before
        anything moves; LoadmasterError when staging failed: then the old plan is active.
        """
        plans = PhasePlans.both(plan, decode)
        future: Future[ApplyReport] = Future()
        self._hand_in_change(lambda: self._active.begin(plans, epoch, future), future)
        return future.result(timeout_s)

    def resize(self, ranks: int, plan: Plan | None = None) -> Plan:
        """Serve on another number of ranks; requests in flight start again from their prompts.

        Fewer: the last ranks leave, and survivors take over what only those held. More: they join
        empty; apply a plan to use them. plan: go to this one instead. Returns the active plan.
        """
        wanted = None if plan is None else PhasePlans.both(plan)
        future: Future[Plan] = Future()

        def change() -> None:
            epoch = self._active.epoch + 1
            plans = self._workers.plans_for(ranks, self._active.plans, wanted)
            self._journal.resize(epoch, plans)
            try:
                self._reform(self._workers.resize(plans, epoch))
            except PlanError:                   # as many ranks as before serve on
                self._journal.try_write("abort", epoch)
                raise
            future.set_result(self._active.plans.prefill)

        self._hand_in_change(change, future)
        return future.result(self.settings.start_timeout_s)

    # ---- the serving thread ----------------------------------------------------------------

    def _serve(self) -> None:
        while self._wait_for_work():
            try:
                self._boundary.run(lambda: self._active.switching)
                self._run_step()
            except Exception as error:
                if not self._recover(error):
                    return

    def _wait_for_work(self) -> bool:
        """True when there is something to do; False when the group stops."""
        while True:
            with self._changed:
                if self._stopping:
                    return False
                if self._has_work() or self._changed.wait_for(self._has_work, IDLE_S):
                    return not self._stopping
            lost = silent_for_certain(self._fleet)
            if lost and not self._recover(
                RankLostError(tuple(lost), "a rank died while the group was idle")
            ):
                return False

    def _has_work(self) -> bool:
        idle = self._scheduler.idle and not self._active.switching
        return self._boundary.waiting or not idle or self._stopping

    def _run_step(self) -> None:
        stage, commit = self._active.next_of_switch()
        with self._changed:
            phase = self._next_phase()
            chunks_G = self._scheduler.next_step(phase=phase)
            release_G = self._scheduler.take_release()
            if not any(chunks_G) and not self._active.switching:
                self._scheduler.put_back_release(release_G)
                return
            works = self._works(chunks_G, release_G, phase, stage, commit)
        began = time.perf_counter()
        answers = [self._fleet.call(g, "step", work) for g, work in enumerate(works)]
        results: list[StepResult] = self._await_step(answers)
        wall_us = (time.perf_counter() - began) * 1e6
        switching = self._active.switching
        with self._changed:
            self._failures = 0
            told = [r.recording_trouble for r in results if r.recording_trouble]
            self._recording_trouble = told[0] if told else ""
            self._scheduler.finish_step(chunks_G, results)
            self._book.keep_outputs(results)
            if any(chunks_G):
                self._log.add(results, wall_us, staging=switching)
            self._changed.notify_all()
        self._metrics.step(results, wall_us, self._active.epoch)
        if self._active.advance(commit, results, wall_us):
            self._metrics.switched(self._active.epoch)

    def _next_phase(self) -> int | None:
        """None: both phases in one step. Under two plans they take turns."""
        if not self._active.plans.apart:
            return None
        open_phases = self._scheduler.phases()
        other = PREFILL if self._last_phase == DECODE else DECODE
        self._last_phase = other if other in open_phases else self._last_phase
        return self._last_phase

    def _works(
        self,
        chunks_G: list[tuple[Chunk, ...]],
        release_G: list[tuple[int, ...]],
        phase: int | None,
        stage: tuple[Round, ...],
        commit: Tables | None,
    ) -> list[StepWork]:
        """What each rank does next."""
        self._step += 1
        return [
            StepWork(
                step=self._step,
                epoch=self._active.epoch if commit is None else commit.epoch,
                phase=PREFILL if phase is None else phase,
                chunks=chunks,
                release=release,
                record=self._switches.recording,
                domain_names=tuple(self._book.domain_names),
                digest=self._switches.digests,
                all_logits=self._switches.all_logits,
                stage=stage,
                expected=self._active.expected if stage else {},
                commit=commit,
                evict=commit is not None,
            )
            for chunks, release in zip(chunks_G, release_G, strict=True)
        ]

    def _await_step(self, answers: list[Any]) -> list[StepResult]:
        """The ranks' results. A step that takes suspiciously long makes us ask for signs of life.

        A rank that gives none is lost; busy ones are waited for, up to the hard limit.
        """
        hard_s = self.settings.step_timeout_s
        try:
            return gather_watched(
                self._fleet, answers, hard_s, patience_s=self._log.overdue_s(hard_s),
                answer_s=QUICK_ANSWER_S if self._log.knows_pace else ANSWER_S,
            )
        except ExchangeError as error:
            raise self._cause(answers, error) from error

    def _cause(self, answers: list[Any], seen: Exception) -> Exception:
        """Why an exchange failed: the rank that failed first, where it can still tell."""
        raised = self._fleet.failures(answers, _CAUSE_S)
        return next((e for e in raised if not isinstance(e, ExchangeError)), seen)

    # ---- when ranks die --------------------------------------------------------------------

    def _recover(self, error: Exception) -> bool:
        """Bring the group back after a failed step; False when that cannot be done."""
        reason = str(error) if isinstance(error, LoadmasterError) else repr(error)
        self._failures += 1
        known = error.ranks if isinstance(error, RankLostError) else ()
        noticed_at = time.time()
        try:
            recovered = self._rebuilt(known, reason)
            self._reform(recovered)
        except Exception as second:
            self._break(f"{reason}; and the group could not be rebuilt: {second}")
            return False
        self._recoveries.append(recovered.timed(noticed_at))
        self._metrics.recovered(self._recoveries[-1].seconds)
        if self._failures >= _FAILURES_IN_A_ROW:
            self._fail_requests(f"{self._failures} steps in a row failed, the last with: {reason}")
        return True

    def _rebuilt(self, known: Sequence[int], reason: str) -> Recovered:
        """The group as it is rebuilt; a rank that dies meanwhile is one more to replace."""
        plans, epoch = self._active.after_failure()
        for attempt in range(_REBUILDS):
            try:
                return self._workers.recover(known, reason, plans, epoch)
            except (RankLostError, OverdueError, ExchangeError) as error:
                if attempt == _REBUILDS - 1:
                    raise
                known = error.ranks if isinstance(error, RankLostError) else ()
        raise AssertionError("unreachable")

    def _reform(self, recovered: Recovered) -> None:
        """The group serves again: requests start anew, a switch ends or begins again."""
        with self._changed:
            self._scheduler.restart_all(self._fleet.ranks)
            self._log.forget_pace()
        if self._active.reformed(recovered.plans, recovered.epoch):
            self._metrics.switched(self._active.epoch)

    # ---- small things ----------------------------------------------------------------------

    def _at_boundary(self, work: Callable[[], Answer]) -> Answer:
        """Run `work` in the serving thread between two steps."""
        with self._changed:
            self._require_serving()
            future = self._boundary.hand_in(work)
        return future.result(self.settings.start_timeout_s)

    def _hand_in_change(self, work: Callable[[], None], future: Future[Any]) -> None:
        with self._changed:
            self._require_serving()
            self._boundary.hand_in_change(work, future)

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
        self._fail_requests(reason)
        with self._changed:
            self._boundary.fail(reason)
            self._active.give_up(reason)

    def _fail_requests(self, reason: str) -> None:
        with self._changed:
            for request in self._scheduler.requests:
                request.fail(f"request {request.number} failed: {reason}")
            self._scheduler.drop_all()
            self._failures = 0
            self._changed.notify_all()

