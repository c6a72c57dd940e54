"""`run`: a named group of live ranks, and its controller."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LoadmasterError, UsageError
from . import output as show
from .endings import ignore_endings
from .options import Address

if TYPE_CHECKING:
    from ..placement.dispatch.token_limit import CapacityRule
    from ..placement.rebalancing.proposal import Entry
    from ..workers.control.controller import Controller
    from ..workers.group.group import Group

CONTROLS = {"never": "never", "every-n": "every_n", "drift": "drift", "net-benefit": "net_benefit"}

PlanFile = Annotated[
    Path | None, typer.Option(help="Plan to serve under [default: experts in order].")
]
DecodePlan = Annotated[Path | None, typer.Option(help="A plan of its own for decode.")]
ServedTraffic = Annotated[str, typer.Option(help="return_home/per_expert or return_home/per_rank.")]
RecordTo = Annotated[
    Path | None, typer.Option(help="Record routing to this new trace folder.")
]
CapacityName = Annotated[
    str | None,
    typer.Option("--capacity-rule", help="drop or reroute what is over an expert's capacity; "
                 "changes the output [default: off]."),
]
CapacityFactor = Annotated[
    float | None, typer.Option(help="Capacity over an expert's mean load, with --capacity-rule.")
]
ControlName = Annotated[
    str | None,
    typer.Option("--control", help="Look for better plans while serving and switch to them: "
                 "never, every-n, drift or net-benefit [default: no controller]."),
]
ControlDry = Annotated[
    bool, typer.Option("--control-dry-run", help="With --control: decide and log, switch never.")
]
ControlEvery = Annotated[int, typer.Option(help="With --control: steps between looks.")]
ControlWindow = Annotated[int, typer.Option(help="With --control: steps of a window.")]
ControlSlots = Annotated[
    int | None,
    typer.Option(help="With --control: expert slots per rank and layer that its plans may use "
                 "[default: an even share + 25 %, and at least its plan's]."),
]


def run(
    model: Annotated[Path, typer.Option(help="Checkpoint folder of any Hugging Face MoE model.")],
    ranks: Annotated[int, typer.Option(help="Worker processes, one per GPU or CPU share.")],
    plan: PlanFile = None,
    decode_plan: DecodePlan = None,
    name: Annotated[str, typer.Option(help="What `apply` finds the group by.")] = "default",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float64.")] = "bfloat16",
    traffic: ServedTraffic = "return_home/per_expert",
    record_to: RecordTo = None,
    capacity_rule: CapacityName = None,
    capacity_factor: CapacityFactor = None,
    control: ControlName = None,
    control_dry_run: ControlDry = False,
    control_every: ControlEvery = 1000,
    control_window: ControlWindow = 32,
    control_slots: ControlSlots = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --control: run folder [default: the next loadmaster-runs/run-N]."),
    ] = None,
    gpus_per_rank: Annotated[
        float,
        typer.Option(help="GPUs of each rank; 0: on the CPU. Rows cross in the host's memory."),
    ] = 0.0,
    address: Address = None,
) -> None:
    """Start a named group of live ranks; serves until Ctrl-C, and ends it then."""
    from ..app.inputs import load_plan
    from ..workers.group.group import Group

    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: a group needs at least one rank")
    rule = _rule(capacity_rule, capacity_factor)
    advised = _Advised(control, control_dry_run, control_every, control_window, control_slots, out,
                       shares_cores=address is None)
    advised.check()
    if control is not None and gpus_per_rank:
        raise UsageError(
            "--control times experts in this process, on the CPU: it is for groups without "
            "--gpus-per-rank; apply plans made with a calibrated hardware profile instead"
        )
    group = Group.start(
        model, load_plan(plan), ranks=ranks, name=name, dtype=dtype,
        decode_plan=load_plan(decode_plan), traffic=traffic, record_to=record_to, address=address,
        gpus_per_rank=gpus_per_rank, capacity=rule,
    )
    _serve(group, advised, recording=record_to is not None, rule=rule)


class _Advised:
    """The controller that the options ask for."""

    def __init__(
        self, name: str | None, dry_run: bool, every: int, window: int, slots: int | None,
        out: Path | None, *, shares_cores: bool,
    ) -> None:
        self._shares_cores = shares_cores
        self._name, self._dry_run, self._every, self._window = name, dry_run, every, window
        self._slots, self._out = slots, out

    def check(self) -> None:
        """Raise UsageError, before anything is started, for options that mean nothing."""
        if self._name is None:
            if self._dry_run or self._out is not None:
                raise UsageError("--control-dry-run and --out go with --control: name a policy")
            return
        if self._name not in CONTROLS:
            raise UsageError(
                f"--control {self._name}: there are {', '.join(CONTROLS)}"
            )
        if self._every < 1 or self._window < 1:
            raise UsageError("--control-every and --control-window must be at least 1")
        if self._out is not None and self._out.exists():
            raise UsageError(f"{self._out} exists: name another run folder with --out")

    def controller(self, group: Group) -> Controller | None:
        """Ready to tick; prints where it logs. None where none was asked for."""
        if self._name is None:
            return None
        from ..foundation.output_folder import new_run_folder
        from ..placement.rebalancing.policy import Policy
        from ..workers.control.controller import Controller
        from ..workers.control.decisions import Control
        from ..workers.control.supervise import roomy_cluster

        policy = Policy(CONTROLS[self._name], every_steps=self._every)  # type: ignore[arg-type]
        log = new_run_folder(self._out, "run") / "control.jsonl"
        show.print_line(f"control {self._name}: every decision goes to {log}")
        return Controller(
            group, roomy_cluster(group.status(), self._slots),
            Control(policy, window_steps=self._window, advise_only=self._dry_run,
                    planning_shares_cores=self._shares_cores),
            log=log, on_entry=_tell,
        )


def _tell(entry: Entry) -> None:
    numbers = ", ".join(f"{k} {v:,.4g}" for k, v in entry.numbers.items())
    show.print_line(f"step {entry.step}: {entry.answer}: {entry.reason} ({numbers})")


def _serve(group: Group, advised: _Advised, *, recording: bool, rule: CapacityRule | None) -> None:
    """Until interrupted or broken; then say what there is to say, and end the group."""
    from ..workers.control.supervise import watch

    try:
        if recording:
            group.record(True)
        _greet(group)
        watch(group, advised.controller(group), on_trouble=show.print_line)
    except KeyboardInterrupt:
        _ending(group, rule)
    except BaseException:
        _ending(group, rule)
        raise


def _ending(group: Group, rule: CapacityRule | None) -> None:
    """End the group, whatever it can or cannot tell any more. A second signal changes nothing."""
    from ..workers.group.connection import CoordinatorGoneError

    ignore_endings()
    show.print_line(f"ending group {group.name!r}")
    try:
        _report(group, rule)
    finally:
        with contextlib.suppress(CoordinatorGoneError):
            group.stop()


def _greet(group: Group) -> None:
    spec, status = group.model_spec, group.status()
    show.print_verdict(
        f"group {group.name!r} serves {spec.name}: {spec.num_layers} MoE layers x "
        f"{spec.num_experts} experts on {status['plan'].num_devices} ranks; Ctrl-C or SIGTERM "
        "ends it"
    )
    show.print_line(
        f"from another shell: loadmaster apply PLAN --name {group.name}; "
        f"from Python: loadmaster.Group.find({group.name!r})"
    )
    for note in status["notes"]:
        show.print_line(f"note: {note}")


def _report(group: Group, rule: CapacityRule | None) -> None:
    """What was recorded and what a capacity rule did; a broken group prints what it cannot tell."""
    from ..workers.control.supervise import capacity_report, recording_report

    try:
        if rule is not None:
            show.print_line(capacity_report(group.measurements(), group.model_spec))
        show.print_line(recording_report(group.end_recording()))
    except LoadmasterError as error:
        show.print_line(f"what was recorded is not known: {error}")


def _rule(name: str | None, factor: float | None) -> CapacityRule | None:
    from ..placement.dispatch.token_limit import CapacityRule

    if name is None and factor is None:
        return None
    if name is None or factor is None:
        raise UsageError("--capacity-rule and --capacity-factor go together: name both")
    return CapacityRule(name, factor)  # type: ignore[arg-type]
