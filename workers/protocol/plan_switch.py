"""One plan switch, from the first byte staged to the commit or the abort.

Knows the plans, what still has to move, and what arrived. Knows nothing of Ray or tensors: the
coordinator asks it what the next step carries and gives it what came back.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from ...errors import LoadmasterError
from ...placement.dispatch.policies import policy_of
from ...placement.plan import Plan, PlanError
from ...traces.model_spec import ModelSpec
from .phase_plans import PhasePlans, Tables
from .step_messages import StepResult
from .transfers import Round, Transfer, pack_steps, plan_rounds, plan_transfers

_PIECE_BYTES = 1 << 20
_ATTEMPTS = 3


@dataclass(frozen=True)
class ApplyReport:
    """What one switch did."""

    epoch: int
    moved: tuple[tuple[int, int, int], ...]      # (layer, device, expert) that were new there
    moved_bytes: int
    retried_bytes: int     # sent again after a corruption or a lost rank
    stage_steps: int
    stage_us: float        # wall time of the steps that staged, all they did included
    verify_us: float       # wall time of reading all of it once more, before the commit
    commit_us: float       # wall time of the step that committed


def check_plans(plans: PhasePlans, current: PhasePlans, model: ModelSpec) -> None:
    """Raise PlanError when a plan is not one for this model and this group, UsageError on a
    dispatch policy that means nothing."""
    here = current.prefill
    wanted = (here.num_layers, here.num_experts, here.num_devices)
    own = model.own_layer_indices()
    for plan in (plans.prefill, plans.decode):
        policy_of(plan.dispatch)
        given = (plan.num_layers, plan.num_experts, plan.num_devices)
        if given != wanted:
            raise PlanError(
                f"the plan is for {given[0]} layers x {given[1]} experts on {given[2]} devices; "
                f"this group serves {wanted[0]} x {wanted[1]} on {wanted[2]} ranks: plan for it"
            )
        if _names_other_layers(plan, own):
            raise PlanError(
                f"the plan names the layers {plan.layer_indices[:4]}..., this model's MoE layers "
                f"are {own[:4]}...: it is a plan for another model"
            )
        if plan.model_digest not in ("", model.digest()) and _differs_in_kind(plan, model):
            raise PlanError(
                f"the plan is for the model {plan.model_digest}, this group serves "
                f"{model.digest()} ({model.name}): it is a plan for another model"
            )


def _names_other_layers(plan: Plan, own: tuple[int, ...]) -> bool:
    positions = tuple(range(plan.num_layers))
    return plan.layer_indices not in ((), positions, own)


def _differs_in_kind(plan: Plan, model: ModelSpec) -> bool:
    """Whether the digest is of another model, and not of this one at another precision."""
    for size in (1.0, 2.0, 4.0):
        same = model.model_copy(
            update={"bytes_per_parameter": size, "activation_bytes": max(size, 2.0)}
        )
        if same.digest() == plan.model_digest:
            return False
    return True


class PlanSwitch:
    """Stage, then commit; or abort. Driven by the coordinator at step boundaries."""

    def __init__(
        self,
        plans: PhasePlans,
        epoch: int,
        expert_bytes: int,
        budget_bytes: int,
        future: Future[ApplyReport],
    ) -> None:
        self.plans = plans
        self.epoch = epoch
        self.expected: dict[tuple[int, int], str] = {}
        self.failed = ""
        self._future = future
        self._expert_bytes, self._budget_bytes = expert_bytes, budget_bytes
        self._moved: set[tuple[int, int, int]] = set()
        self._transfers: list[Transfer] = []
        self._missing: set[tuple[int, int, int]] = set()
        self._queue: list[tuple[Round, ...]] = []
        self._attempts = 1
        self._begins = 0
        self._retried_bytes = 0
        self._stage_steps = 0
        self._stage_us = self._verify_us = 0.0

    def begin(
        self, held_GL: list[list[list[int]]], fingerprints: dict[tuple[int, int], str]
    ) -> None:
        """Plan the transfers from what the ranks hold now, [G, L] lists of experts.

        Called again after a rank was lost: what had arrived was thrown away and is sent again.
        """
        self._begins += 1
        if self._begins > _ATTEMPTS:
            self.failed = (
                f"staging was interrupted {_ATTEMPTS} times: the old plan stays active; see why "
                "ranks fail, then apply again"
            )
            self._queue = []
            return
        layers = range(self.plans.prefill.num_layers)
        held = [[frozenset(row[layer]) for row in held_GL] for layer in layers]
        self._transfers = plan_transfers(held, self.plans.wanted_LG(), self._expert_bytes)
        triples = {(t.layer, t.target, t.expert) for t in self._transfers}
        again = triples & self._moved
        self._retried_bytes += len(again) * self._expert_bytes
        self._moved |= triples
        self._missing = set(triples)
        self.expected = {
            (t.layer, t.expert): fingerprints[t.layer, t.expert] for t in self._transfers
        }
        self._queue = self._steps_of(self._transfers)

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
        return Tables.of(self.plans, self.epoch)

    def note(self, results: list[StepResult], wall_us: float) -> None:
        """Take what arrived in a step; what arrived corrupted is sent again, twice at most."""
        self._stage_steps += 1
        self._stage_us += wall_us
        for result in results:
            for layer, expert in result.staged:
                self._missing.discard((layer, result.rank, expert))
        self._send_again(sorted((r.rank, key) for r in results for key in r.corrupted))

    def verified(self, wrong_G: list[list[tuple[int, int]]], wall_us: float) -> bool:
        """Take what each rank found changed since it arrived; whether nothing was. What was
        thrown away is sent again."""
        wrong = sorted((rank, key) for rank, keys in enumerate(wrong_G) for key in keys)
        self._missing |= {(layer, rank, expert) for rank, (layer, expert) in wrong}
        self._verify_us = wall_us
        self._send_again(wrong)
        return not wrong

    def _send_again(self, wrong: list[tuple[int, tuple[int, int]]]) -> None:
        if not wrong:
            return
        if self._attempts >= _ATTEMPTS:
            rank, (layer, expert) = wrong[0]
            self.failed = (
                f"expert {expert} of layer {layer} arrived corrupted on rank {rank}, or was so "
                f"before it served, {_ATTEMPTS} times: the old plan stays active"
            )
            return
        again = [t for t in self._transfers if (t.target, (t.layer, t.expert)) in wrong]
        self._attempts += 1
        self._retried_bytes += sum(t.size_bytes for t in again)
        self._queue.extend(self._steps_of(again))

    def committed(self, wall_us: float) -> None:
        """Every rank runs under the new tables."""
        self._future.set_result(
            ApplyReport(
                epoch=self.epoch,
                moved=tuple(sorted(self._moved)),
                moved_bytes=len(self._moved) * self._expert_bytes,
                retried_bytes=self._retried_bytes,
                stage_steps=self._stage_steps,
                stage_us=self._stage_us,
                verify_us=self._verify_us,
                commit_us=wall_us,
            )
        )

    def aborted(self, reason: str = "") -> None:
        """Nothing changed; tell who asked."""
        self._future.set_exception(LoadmasterError(self.failed or reason))
