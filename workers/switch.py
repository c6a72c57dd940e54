"""One plan switch, from the first byte staged to the commit or the abort.

Knows the plan, what still has to move, and what arrived. Knows nothing of Ray or tensors: the
coordinator asks it what the next step should carry and tells it what came back.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from ..errors import LoadmasterError
from ..placement.plan import Plan, PlanError
from ..traces.spec import ModelSpec
from .tables import Tables
from .transfers import Round, Transfer, pack_steps, plan_rounds, plan_transfers
from .work import StepResult

_PIECE_BYTES = 1 << 20
_ATTEMPTS = 3


@dataclass(frozen=True)
class ApplyReport:
    """What one switch did."""

    epoch: int
    moved: tuple[tuple[int, int, int], ...]      # (layer, device, expert) that were new there
    moved_bytes: int
    retried_bytes: int
    stage_steps: int
    stage_us: float        # wall time of the steps that staged, all they did included
    commit_us: float       # wall time of the step that committed


def check_plan(plan: Plan, current: Plan, model: ModelSpec) -> None:
    """Raise PlanError when the plan is not one for this model and this group."""
    wanted = (current.num_layers, current.num_experts, current.num_devices)
    given = (plan.num_layers, plan.num_experts, plan.num_devices)
    if given != wanted:
        raise PlanError(
            f"the plan is for {given[0]} layers x {given[1]} experts on {given[2]} devices; this "
            f"group serves {wanted[0]} x {wanted[1]} on {wanted[2]} ranks: plan for this group"
        )
    own = model.own_layer_indices()
    if plan.layer_indices and current.layer_indices and plan.layer_indices != own:
        raise PlanError(
            f"the plan names the layers {plan.layer_indices[:4]}..., this model's MoE layers are "
            f"{own[:4]}...: it is a plan for another model"
        )


class PlanSwitch:
    """Stage, then commit; or abort. Driven by the coordinator at step boundaries."""

    def __init__(
        self,
        plan: Plan,
        held_GL: list[list[list[int]]],
        fingerprints: dict[tuple[int, int], str],
        epoch: int,
        model: ModelSpec,
        budget_bytes: int,
        future: Future[ApplyReport],
    ) -> None:
        """held_GL: experts in each rank's memory, by rank and layer."""
        self.plan = plan
        self._epoch = epoch
        self._future = future
        self._budget_bytes = budget_bytes
        layers = range(plan.num_layers)
        held = [[frozenset(row[layer]) for row in held_GL] for layer in layers]
        size_bytes = int(model.bytes_per_expert_E()[0])
        self._transfers = plan_transfers(held, plan, size_bytes)
        self._missing = {(t.layer, t.expert, t.target) for t in self._transfers}
        self.expected = {
            (t.layer, t.expert): fingerprints[t.layer, t.expert] for t in self._transfers
        }
        self._queue = self._steps_of(self._transfers)
        self._attempts = 1
        self._retried_bytes = 0
        self._stage_steps = 0
        self._stage_us = 0.0
        self.failed = ""

    def _steps_of(self, transfers: list[Transfer]) -> list[tuple[Round, ...]]:
        rounds = plan_rounds(transfers, min(_PIECE_BYTES, self._budget_bytes))
        return pack_steps(rounds, self._budget_bytes)

    def next_stage(self) -> tuple[Round, ...]:
        """Rounds for the next step; empty when all bytes have been sent."""
        return self._queue.pop(0) if self._queue else ()

    def ready_to_commit(self) -> Tables | None:
        """The new tables once every expert has arrived whole and right."""
        if self._queue or self._missing or self.failed:
            return None
        return Tables.of(self.plan, self._epoch)

    def note(self, results: list[StepResult], wall_us: float) -> None:
        """Take what arrived in a step; what arrived corrupted is sent again, up to three times."""
        self._stage_steps += 1
        self._stage_us += wall_us
        for result in results:
            for layer, expert in result.staged:
                self._missing.discard((layer, expert, result.rank))
        wrong = sorted((r.rank, key) for r in results for key in r.corrupted)
        if not wrong:
            return
        again = [
            t for t in self._transfers if (t.target, (t.layer, t.expert)) in wrong
        ]
        if self._attempts >= _ATTEMPTS:
            rank, (layer, expert) = wrong[0]
            self.failed = (
                f"expert {expert} of layer {layer} arrived corrupted on rank {rank} "
                f"{_ATTEMPTS} times: the old plan stays in force"
            )
            return
        self._attempts += 1
        self._retried_bytes += sum(t.size_bytes for t in again)
        self._queue.extend(self._steps_of(again))

    def committed(self, wall_us: float) -> None:
        """Every rank runs under the new tables."""
        self._future.set_result(
            ApplyReport(
                epoch=self._epoch,
                moved=tuple(sorted((t.layer, t.target, t.expert) for t in self._transfers)),
                moved_bytes=sum(t.size_bytes for t in self._transfers),
                retried_bytes=self._retried_bytes,
                stage_steps=self._stage_steps,
                stage_us=self._stage_us,
                commit_us=wall_us,
            )
        )

    def aborted(self, reason: str = "") -> None:
        """Nothing changed; tell who asked."""
        self._future.set_exception(LoadmasterError(self.failed or reason))
