"""Group: live ranks under one name. Start one, find one, serve, record, switch plans.

The face of the workers. Knows how to reach a group's coordinator; what happens inside is the
coordinator's and the ranks' business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LoadmasterError, UsageError
from ...placement.cluster import Cluster, Traffic
from ...placement.dispatch.token_limit import CapacityRule
from ...placement.plan import DispatchSpec, Plan, Provenance
from ...traces.model_spec import ModelSpec
from ...traces.recording.recorder import RecordingSummary
from ...traces.trace import RoutingTrace
from ..coordinator.coordinator import Coordinator
from ..coordinator.journal import Journal, journal_lock
from ..coordinator.metrics import RayMetrics
from ..coordinator.request_registry import RequestState
from ..coordinator.step_log import Measurements
from ..fleet.joining import NothingAnswersError
from ..fleet.ray_fleet import NAMESPACE, RayFleet, cluster_address, connect, end_group
from ..protocol.phase_plans import PhasePlans
from ..protocol.plan_switch import ApplyReport, check_plans
from ..protocol.settings import (
    SERVED_TRAFFIC,
    GroupSettings,
    Limits,
    RankSettings,
    served_spec,
)
from ..protocol.step_messages import ReplayedRouting
from . import run_folder
from .connection import Connection, CoordinatorGoneError, Order, Stream, run
from .prompt_tokens import Prompt, as_tokens

# Ray declares few of its types.
ray: Any = importlib.import_module("ray")

_PREDECESSOR_S = 10.0      # how long a coordinator that died may take to let go of the journal


class CoordinatorActor(Coordinator):
    """The coordinator with a Ray fleet, as it lives in its own process."""

    def __init__(self, settings: GroupSettings, cpus_per_rank: float | None, gpus: float) -> None:
        self._lock = journal_lock(settings.journal)
        if not self._lock.take(_PREDECESSOR_S):
            raise LoadmasterError(f"{settings.journal}: another group's coordinator writes there")
        follows = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        if not follows:
            Journal(settings.journal).clear()
        fleet = RayFleet(settings.name, cpus_per_rank, gpus)
        super().__init__(settings, fleet, RayMetrics(settings.name))
        if follows:
            self.resume()


@dataclass(frozen=True)
class PrefillResult:
    """What a prefill produced, in the order of the prompts."""

    next_tokens: tuple[int, ...]       # argmax at the last position of each prompt
    digests: tuple[str, ...]           # of every output row of each prompt
    steps: int
    tokens: int

    @property
    def digest(self) -> str:
        """One digest of all outputs: equal digests, equal bits."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()


class Group:
    """A running group. Handles are cheap; `find` gives another one to the same group."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._line = Connection(name, actor)
        self._model_dir: str | None = None

    @classmethod
    def start(
        cls,
        model_dir: str | Path,
        plan: Plan | None = None,
        *,
        ranks: int,
        decode_plan: Plan | None = None,
        name: str = "default",
        dtype: str = "bfloat16",
        traffic: str | None = None,
        dispatch: str | DispatchSpec | None = None,
        record_to: str | Path | None = None,
        journal: str | Path | None = None,
        cluster: Cluster | None = None,
        address: str | None = None,
        cpus_per_rank: float | None = None,
        gpus_per_rank: float = 0.0,
        capacity: CapacityRule | None = None,
        limits: Limits | None = None,
        step_timeout_s: float = 120.0,
        replace_timeout_s: float = 60.0,
    ) -> Group:
        """Start a named group of `ranks` ranks serving a checkpoint under a plan.

        plan: None = experts in order, E / ranks on each. dispatch: None = the plan's own. cluster:
        what dispatch knows of nodes and speeds; None = one node of equal CPU devices. traffic: None
        = the cluster's own, or else return_home/per_expert; given, it replaces the cluster's. So
        dispatch, exchange and every prediction are of the same payload. address: an
        existing Ray cluster; None = the one joined already, or a new one on this machine.
        gpus_per_rank: above 0, ranks compute on GPUs; rows still travel through the host's memory.
        replace_timeout_s: how long to try before a lost rank counts as lost for good.
        Raises InputError on a checkpoint that cannot be served, PlanError on plans that are not
        for it, UsageError on a name in use.
        """
        run_folder.check_name(name)
        if ranks < 1:
            raise UsageError(f"a group needs at least one rank, not {ranks}")
        served = _served_traffic(cluster, traffic)
        if not 0 <= gpus_per_rank <= 1:
            raise UsageError(
                f"gpus_per_rank must lie in [0, 1], not {gpus_per_rank}: a rank computes on the "
                "CPU (0), on a GPU, or on a share of one"
            )
        spec = served_spec(model_dir, dtype)
        if plan is None and ranks > spec.num_experts:
            raise UsageError(
                f"{ranks} ranks for {spec.num_experts} experts: without a plan that repeats some, "
                f"at most {spec.num_experts} ranks hold any"
            )
        plan = plan or contiguous(spec, ranks)
        if dispatch is not None:
            plan = with_dispatch(plan, dispatch)
        if plan.num_devices != ranks:
            raise UsageError(f"the plan is for {plan.num_devices} devices, the group has {ranks}")
        plans = PhasePlans.both(plan, decode_plan)
        check_plans(plans, PhasePlans.both(contiguous(spec, ranks)), spec)
        cluster = cluster or Cluster.preset(
            "cpu", devices_per_node=ranks, slots_per_device=plan.slots_per_device
        )
        if cluster.num_devices != ranks:
            raise UsageError(
                f"the cluster has {cluster.num_devices} devices, the group has {ranks} ranks"
            )
        cluster = cluster.model_copy(update={"traffic": served})
        settings = GroupSettings(
            name=name,
            ranks=tuple(
                RankSettings(
                    g, ranks, str(Path(model_dir).resolve()), cluster, dtype,
                    None if record_to is None else str(Path(record_to).resolve()),
                    capacity=capacity, device="cuda" if gpus_per_rank else "cpu",
                )
                for g in range(ranks)
            ),
            plans=plans,
            model_spec=spec,
            journal="",
            limits=limits or Limits(),
            step_timeout_s=step_timeout_s,
            replace_timeout_s=replace_timeout_s,
        )
        connect(address)
        _require_gpus(ranks * gpus_per_rank)
        with run_folder.naming(name):
            if _find(name) is not None:
                raise UsageError(
                    f"a group named {name!r} is running: stop it, or take another name"
                )
            folder = Path(journal or run_folder.group_folder(name) / "journal")
            _require_unused(folder, name)
            if journal is None:
                run_folder.group_folder(name, fresh=True)
            settings = dataclasses.replace(settings, journal=str(folder))
            actor = ray.remote(CoordinatorActor).options(
                name=name, namespace=NAMESPACE, lifetime="detached", num_cpus=0,
                max_concurrency=32, max_restarts=-1, scheduling_strategy=_this_node(),
            ).remote(settings, cpus_per_rank, gpus_per_rank)
        group = cls(name, actor)
        try:
            group._line.ask("start")
        except BaseException:
            end_group(name)
            run_folder.remove(name)
            raise
        run_folder.write_address(name, cluster_address())
        return group

    @classmethod
    def find(cls, name: str = "default", address: str | None = None) -> Group:
        """The running group of that name. Raises UsageError when there is none.

        address: its Ray cluster; None = the one joined already, or the one noted on this machine.
        """
        if not ray.is_initialized() and address is None:
            _connect_as_noted(name)
        else:
            connect(address)
        actor = _find(name)
        if actor is None:
            raise UsageError(f"no group named {name!r} is running", call="Group.start starts one",
                             command=f"`loadmaster run --name {name}` starts one")
        return cls(name, actor)

    # ---- serving ---------------------------------------------------------------------------

    def prefill(
        self,
        prompts: Sequence[Prompt],
        domains: Sequence[str] | None = None,
        step_tokens: int = 4096,
    ) -> PrefillResult:
        """Run prompts through the model in steps of about `step_tokens` rows over all ranks."""
        before = self._line.ask_again("status")
        self._line.ask_again("configure", digests=True, step_tokens=step_tokens)
        try:
            states = self._run(prompts, 1, domains)
        finally:
            self._line.ask_again("configure", digests=False, step_tokens=before["step_tokens"])
        return PrefillResult(
            next_tokens=tuple(s.tokens[0] for s in states),
            digests=tuple(s.digest for s in states),
            steps=self._line.ask_again("status")["step"] - before["step"],
            tokens=sum(len(self._tokens(p)) for p in prompts),
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        domains: Sequence[str] | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> list[list[int]]:
        """Greedy continuation of every prompt, batched continuously."""
        states = self._run(prompts, max_new_tokens, domains, stop_tokens)
        return [list(s.tokens) for s in states]

    def submit(
        self,
        prompt: Prompt,
        max_new_tokens: int = 64,
        domain: str | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> Stream:
        """Send one request, token ids or text; its tokens stream.

        Raises InputError when it cannot be served.
        """
        tokens = np.asarray(self._tokens(prompt))
        order = Order(tokens, max_new_tokens, domain, tuple(stop_tokens))
        return Stream(self._line, order)

    def logits(
        self,
        prompts: Sequence[Sequence[int]],
        replays: Sequence[ReplayedRouting] | None = None,
    ) -> list[tuple[Any, Any]]:
        """For parity checks: (logits [rows, V], the router's own choice [L, rows, K]) per prompt.

        replays: routing to use instead of the router's; without, the second item is None.
        """
        self._line.ask_again("configure", all_logits=True)
        try:
            states = run(
                self._line,
                [
                    Order(np.asarray(p), 1, replay=None if replays is None else replays[i])
                    for i, p in enumerate(prompts)
                ],
            )
            return [self._line.ask_again("logits", s.number) for s in states]
        finally:
            self._line.ask_again("configure", all_logits=False)

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str | bytes):
            return prompt
        if self._model_dir is None:
            self._model_dir = str(self._line.ask_again("status")["model_dir"])
        return as_tokens(prompt, self._model_dir)

    def _run(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        domains: Sequence[str] | None,
        stop_tokens: Sequence[int] = (),
    ) -> list[RequestState]:
        if domains is not None and len(domains) != len(prompts):
            raise UsageError(f"{len(domains)} domains for {len(prompts)} prompts")
        stops = tuple(stop_tokens)
        orders = [
            Order(np.asarray(self._tokens(p)), max_new_tokens, domains[i] if domains else None,
                  stops)
            for i, p in enumerate(prompts)
        ]
        states = run(self._line, orders)
        self._line.ask_again("forget", [s.number for s in states])
        return states

    # ---- recording and measuring -----------------------------------------------------------

    def record(self, on: bool) -> None:
        """Record routing from the next step on, or stop."""
        self._line.ask_again("configure", recording=on)

    def end_recording(self) -> list[RecordingSummary]:
        """Stop recording and finish the files; what each rank kept, and what it lost and why."""
        return self._line.ask("end_recording")  # type: ignore[no-any-return]

    def trace(self, *, take: bool = False) -> RoutingTrace:
        """What all ranks recorded so far, logical ids, in step order. take: only what came since
        it was last taken.

        Raises LoadmasterError when nothing was recorded.
        """
        trace: RoutingTrace | None = self._line.ask_again("trace", take)
        if trace is None:
            raise LoadmasterError("nothing has been recorded: record(True), then serve")
        return trace

    def measurements(self, after_step: int = 0) -> Measurements:
        """CPU times, tokens and copies of the steps after `after_step` (`group.step`, before)."""
        return self._line.ask_again("measurements", after_step)  # type: ignore[no-any-return]

    # ---- plans and life --------------------------------------------------------------------

    def apply(
        self, plan: Plan, decode: Plan | None = None, *, epoch: int | None = None
    ) -> ApplyReport:
        """Switch to another plan without stopping; returns when it is active.

        decode: a plan of its own for new tokens. epoch: the one the plan was made under; if
        another is active by now, nothing happens but an error.
        """
        report: ApplyReport = self._line.ask("apply", plan, decode, epoch)
        return report

    def resize(self, ranks: int, plan: Plan | None = None) -> Plan:
        """Serve on another number of ranks; requests in flight start again from their prompts.

        Fewer: survivors take over what the last ranks held. More: they join empty, unless `plan`
        uses them. Returns the active plan.
        """
        return self._line.ask("resize", ranks, plan)  # type: ignore[no-any-return]

    @property
    def plan(self) -> Plan:
        """The active plan."""
        return self._line.ask_again("status")["plan"]  # type: ignore[no-any-return]

    @property
    def epoch(self) -> int:
        """The number of the active plan; counts up with every switch."""
        return int(self._line.ask_again("status")["epoch"])

    @property
    def model_spec(self) -> ModelSpec:
        """The model served."""
        return self._line.ask_again("status")["model_spec"]  # type: ignore[no-any-return]

    @property
    def step(self) -> int:
        """How many steps have run."""
        return int(self._line.ask_again("status")["step"])

    def status(self) -> dict[str, Any]:
        """Plan, epoch, step, requests in flight, process ids of the ranks; what computes the
        experts, and what was refused on the ranks' machines (`notes`)."""
        return self._line.ask_again("status")  # type: ignore[no-any-return]

    def stop(self) -> None:
        """End the group's processes, and nothing else."""
        try:
            with contextlib.suppress(CoordinatorGoneError):      # ended all the same
                self._line.ask_again("stop")
        finally:
            end_group(self.name)
            run_folder.remove(self.name)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def contiguous(spec: ModelSpec, ranks: int) -> Plan:
    """Experts in order, as even a share on each rank as can be; no replicas."""
    width = -(-spec.num_experts // ranks)
    slots_GC = np.full((ranks, width), -1, np.int16)
    for g, part in enumerate(np.array_split(np.arange(spec.num_experts), ranks)):
        slots_GC[g, : len(part)] = part
    return Plan(
        slots=np.repeat(slots_GC[None], spec.num_layers, axis=0),
        num_experts=spec.num_experts,
        layer_indices=spec.layer_indices or (),
        provenance=Provenance(method="contiguous"),
    )


def with_dispatch(plan: Plan, dispatch: str | DispatchSpec) -> Plan:
    """The same slots under another dispatch."""
    spec = DispatchSpec(policy=dispatch) if isinstance(dispatch, str) else dispatch
    return dataclasses.replace(plan, dispatch=spec)


def _require_unused(journal: Path, name: str) -> None:
    """Raises UsageError where a coordinator of another Ray cluster on this machine writes."""
    lock = journal_lock(journal)
    if not lock.take():
        raise UsageError(
            f"{journal}: a group, on another Ray cluster of this machine, keeps its journal there; "
            f"stop it, or take another name than {name!r}"
        )
    lock.release()


def _served_traffic(cluster: Cluster | None, traffic: str | None) -> Traffic:
    """What the ranks serve: `traffic` if given, else the cluster's own.

    Raises UsageError for traffic that can be planned for and that live ranks do not speak.
    """
    own = Traffic() if cluster is None else cluster.traffic
    served = own if traffic is None else Traffic.parse(traffic)
    if str(served) not in SERVED_TRAFFIC:
        raise UsageError(f"live ranks serve {' and '.join(SERVED_TRAFFIC)}, not {served}")
    return served


def _require_gpus(gpus: float) -> None:
    """Raises UsageError where the Ray cluster does not have as many, idle or not."""
    there = ray.cluster_resources().get("GPU", 0.0)
    if gpus > there:
        raise UsageError(
            f"the ranks ask for {gpus:g} GPUs, the Ray cluster has {there:g}: start fewer ranks, "
            "or leave gpus_per_rank at 0 to compute on the CPU"
        )


def _this_node() -> Any:
    """Where the group is started from: its coordinator's journal lies on this machine's disk."""
    scheduling = importlib.import_module("ray.util.scheduling_strategies")
    node = ray.get_runtime_context().get_node_id()
    return scheduling.NodeAffinitySchedulingStrategy(node, soft=False)


def _connect_as_noted(name: str) -> None:
    """To the cluster that the group was started on from this machine."""
    address = run_folder.read_address(name)
    if address is None:
        raise UsageError(
            f"no group named {name!r} was started on this machine",
            call="Group.start starts one; name its cluster's address= if it runs elsewhere",
            command=f"`loadmaster run --name {name}` starts one; name its cluster with --address "
            "if it runs elsewhere",
        )
    try:
        connect(address)
    except NothingAnswersError as error:
        raise LoadmasterError(
            f"group {name!r} ran at {address}, where nothing answers any more: it was killed",
            call=f"Group.start(name={name!r}) starts it again and clears the old address",
            command=f"`loadmaster run --name {name}` starts it again and clears the old address",
        ) from error


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
