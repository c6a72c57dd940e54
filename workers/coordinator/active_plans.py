"""Which plans are active, and the switch under way to the next ones.

Asks ranks what they hold and have verified, and writes to the journal what begins and ends. Knows
nothing of requests or steps: the coordinator carries each part of a switch in its next step. The
serving thread alone changes it; what other threads read changes under the coordinator's condition.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from ...errors import LoadmasterError
from ..protocol.phase_plans import PhasePlans, Tables
from ..protocol.plan_switch import ApplyReport, PlanSwitch, check_plans
from ..protocol.settings import GroupSettings
from ..protocol.step_messages import StepResult
from ..protocol.transfers import Round
from .journal import Journal, JournalError, JournalState
from .recovery import WorkerSet


class ActivePlans:
    """Plans, their epoch, and at most one switch."""

    def __init__(
        self, settings: GroupSettings, workers: WorkerSet, journal: Journal,
        changed: threading.Condition,
    ) -> None:
        self.plans = settings.plans
        self.epoch = 1
        self.committing = False
        self._model = settings.model_spec
        self._budget_bytes = settings.stage_budget_bytes
        self._workers, self._journal, self._changed = workers, journal, changed
        self._switch: PlanSwitch | None = None

    def resume(self, state: JournalState) -> None:
        """What a predecessor left in its journal: a commit begun is finished, all else undone."""
        if state.plans is not None:
            self.plans = state.plans
        self.epoch = state.epoch
        if state.unfinished is not None:
            if state.committing:
                self.plans, self.epoch = state.unfinished, state.unfinished_epoch
            self._journal.try_write(
                "done" if state.committing else "abort", state.unfinished_epoch
            )

    # ---- a switch ----------------------------------------------------------------------------

    @property
    def switching(self) -> bool:
        """Whether a switch is under way."""
        return self._switch is not None

    @property
    def expected(self) -> dict[tuple[int, int], str]:
        """(layer, expert) -> fingerprint of what is being staged."""
        return {} if self._switch is None else self._switch.expected

    def begin(self, plans: PhasePlans, epoch: int | None, future: Future[ApplyReport]) -> None:
        """Begin to stage; see `Coordinator.apply` for what it raises."""
        check_plans(plans, self.plans, self._model)
        if epoch is not None and epoch != self.epoch:
            raise LoadmasterError(
                f"the plan was made under epoch {epoch}, and {self.epoch} is active: plan again"
            )
        size_bytes = int(self._model.bytes_per_expert_E()[0])
        switch = PlanSwitch(plans, self.epoch + 1, size_bytes, self._budget_bytes, future)
        switch.begin(self._workers.all("held"), self._workers.fingerprints)
        self._journal.write("stage", switch.epoch, plans)
        self._switch = switch

    def next_of_switch(self) -> tuple[tuple[Round, ...], Tables | None]:
        """What the next step carries of it: transfers, or the commit once every expert that
        arrived has been read again and found as it was."""
        switch = self._switch
        if switch is None:
            return (), None
        stage = switch.next_stage()
        commit = None if stage else switch.ready_to_commit()
        if commit is None:
            return stage, None
        began = time.perf_counter()
        wrong_G = self._workers.all("verify", switch.expected)
        if not switch.verified(wrong_G, (time.perf_counter() - began) * 1e6):
            return switch.next_stage(), None
        try:
            self._journal.write("commit", commit.epoch)
        except JournalError as error:
            switch.failed = f"{error}; the old plan stays active"
            return (), None
        self.committing = True
        return (), commit

    def advance(self, commit: Tables | None, results: list[StepResult], wall_us: float) -> bool:
        """Take what a step did of it; whether the new plans are active now."""
        switch = self._switch
        if switch is None:
            return False
        if commit is not None:
            self._finish(switch, wall_us)
            return True
        switch.note(results, wall_us)
        if switch.failed:
            self._workers.all("abort")
            self._journal.try_write("abort", switch.epoch)
            self._switch = None
            switch.aborted()
        return False

    def _finish(self, switch: PlanSwitch, wall_us: float) -> None:
        with self._changed:
            self.plans, self.epoch = switch.plans, switch.epoch
        self._journal.try_write("done", switch.epoch)
        self._switch, self.committing = None, False
        switch.committed(wall_us)

    # ---- when ranks die ----------------------------------------------------------------------

    def after_failure(self) -> tuple[PhasePlans, int]:
        """Roll forward when a commit had begun: every surviving rank holds what it needs."""
        if self._switch is not None and self.committing:
            return self._switch.plans, self._switch.epoch
        return self.plans, self.epoch

    def reformed(self, plans: PhasePlans, epoch: int) -> bool:
        """The group serves again under these: a switch ends or begins again. Whether it ended in
        its commit."""
        switch = self._switch
        rolled_forward = switch is not None and self.committing
        if switch is not None and rolled_forward:
            self._finish(switch, 0.0)
        if plans.prefill.num_devices != self.plans.prefill.num_devices:
            self.give_up("the number of ranks changed: plan again for those there are")
            self._journal.try_write("done", epoch)
        elif self._switch is not None:
            self._switch.begin(self._workers.all("held"), self._workers.fingerprints)
        with self._changed:
            self.plans, self.epoch = plans, epoch
            self._changed.notify_all()
        return rolled_forward

    def give_up(self, reason: str) -> None:
        """Tell who asked for a switch that it will not come."""
        if self._switch is not None:
            self._switch.aborted(reason)
            self._switch = None
