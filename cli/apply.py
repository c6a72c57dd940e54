"""`apply`: move a running group to a plan, or say what that would do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..foundation.units import size
from . import output as show
from .options import Address, Json

if TYPE_CHECKING:
    from ..traces.trace import RoutingTrace
    from ..workers.control.switch_preview import Advice
    from ..workers.group.group import Group
    from ..workers.protocol.phase_plans import PhasePlans

SHOWN_MOVES = 40


def apply(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    decode_plan: Annotated[
        Path | None,
        typer.Option(help="A plan of its own for decode [default: what decode has now, where it "
                     "has one of its own; else PLAN]. Name PLAN again to end that."),
    ] = None,
    name: Annotated[str, typer.Option(help="The running group.")] = "default",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would move and what it is worth; move none.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Judge on this trace [default: what the group recorded].")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Move a running group to a plan: stage, verify, commit, without stopping it."""
    from ..app.inputs import load_plan
    from ..placement.plan import Plan
    from ..workers.control.switch_preview import advise, asked_for
    from ..workers.group.group import Group
    from ..workers.protocol.phase_plans import PhasePlans

    target, decode = Plan.load(plan), load_plan(decode_plan)
    group = Group.find(name, address)
    status = group.status()
    current_plan = PhasePlans.both(status["plan"], status["decode_plan"])
    wanted = asked_for(current_plan, target, decode)
    if dry_run:
        advice = advise(status, wanted, _traffic(group, trace))
        show.print_json(advice.to_dict()) if json else _print(advice)
        return
    switched = _switch(group, wanted, int(status["epoch"]))
    if json:
        show.print_json(switched)
    else:
        _print_done(switched, name, plan, wanted.apart and decode is None)


def _print_done(switched: dict[str, Any], name: str, plan: Path, decode_kept: bool) -> None:
    show.print_verdict(
        f"group {name!r} serves under {plan.name}: epoch {switched['epoch']}, "
        f"{switched['moves']} experts moved, {size(switched['move_bytes'])}"
    )
    if decode_kept:
        show.print_notes(["decode keeps the plan of its own; --decode-plan names another"])


def _traffic(group: Group, trace: Path | None) -> RoutingTrace | None:
    """What to judge on; None where nothing was recorded."""
    from ..app.inputs import read_trace
    from ..errors import LoadmasterError

    if trace is not None:
        return read_trace(trace)[0]
    try:
        return group.trace()
    except LoadmasterError:
        return None


def _switch(group: Group, wanted: PhasePlans, epoch: int) -> dict[str, Any]:
    try:
        report = group.apply(wanted.prefill, wanted.decode, epoch=epoch)
    except KeyboardInterrupt:
        show.print_line(switch_outcome(group.status(), epoch))
        raise typer.Exit(130) from None
    return {
        "epoch": report.epoch, "moves": len(report.moved), "move_bytes": report.moved_bytes,
        "retried_bytes": report.retried_bytes, "stage_steps": report.stage_steps,
        "verify_us": report.verify_us, "commit_us": report.commit_us, "applied": True,
    }


def switch_outcome(status: dict[str, Any], epoch: int) -> str:
    """What became of a switch from this epoch whose caller no longer waits."""
    if status["epoch"] > epoch:
        return (
            f"interrupted, but the switch is done: epoch {status['epoch']} is active; apply the "
            "plan before to go back"
        )
    if status["switching"]:
        return (
            "interrupted; the group goes on with the switch by itself and will commit it: when it "
            f"has (epoch {epoch + 1}), apply the plan before to go back"
        )
    return (
        f"interrupted; epoch {epoch} is active and no switch is under way (one asked for at the "
        "last moment may still begin)"
    )


def _print(advice: Advice) -> None:
    total = sum(advice.move_bytes)
    show.print_verdict(
        f"{advice.verdict}; {len(advice.moves)} experts would move, {size(total)}"
    )
    rows = [
        (f"layer {layer}", device, expert, num_bytes)
        for (layer, device, expert), num_bytes in zip(advice.moves, advice.move_bytes, strict=True)
    ]
    if rows:
        show.print_table(
            "would move", ("layer", "to device", "expert", "bytes"), rows[:SHOWN_MOVES]
        )
    notes = [n for table in advice.tables.values() for n in table.notes]
    if len(rows) > SHOWN_MOVES:
        notes.append(f"{len(rows) - SHOWN_MOVES} moves more: --json lists all")
    if not advice.cluster_is_known:
        notes.append("times: of equal CPU devices (the cpu preset), not measured on this group")
    show.print_notes(notes)
