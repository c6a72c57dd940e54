"""What `plan` does with its options, and how it prints the answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..app.offers import with_offer
from ..foundation.units import size
from . import output as show

if TYPE_CHECKING:
    from ..placement.planning.planner import PlanResult
    from ..placement.rebalancing.advise import Advice
    from ..placement.rebalancing.advise_loads import LoadAdvice
    from ..placement.rebalancing.switch_payback import Moving
    from ..simulator.report.report import Report
    from ..traces.profile import Profile
    from ..traces.trace import RoutingTrace

MOST_MOVES_SHOWN = 40


def answer(
    path: Path,
    source: RoutingTrace | Profile,
    phase: str,
    targets: dict[str, Path | None],
    options: dict[str, Any],
    time_limit: float | None,
    notes: tuple[str, ...],
    *,
    json: bool,
) -> dict[str, Report]:
    """Plan every part, write what was chosen, say it; reports by phase, "" where there is one."""
    from ..errors import UsageError
    from ..placement.rebalancing.trial_plans import TimeLimit
    from ..traces.trace import RoutingTrace

    if not isinstance(source, RoutingTrace):
        if phase != "all":
            raise UsageError(
                f"{path} holds average loads, which do not tell prefill from decode: leave --phase "
                "out, or record a trace with phases"
            )
        limit = {"time_limit_s": time_limit}
        return {"": _answer_loads(source, targets[""], options | limit, notes, json=json)}
    parts = _parts(path, source, targets)
    clock = TimeLimit.start(time_limit)
    answers: dict[str, Advice] = {}
    for name, part in parts.items():
        limit = {"time_limit_s": clock.share(len(parts) - len(answers))}
        answers[name] = _advise(part, options | limit)
    for name, found in answers.items():
        offered = with_offer(found.verdict, source, options["model"])
        advice = answers[name] = replace(found, verdict=offered)
        target = targets[name]
        if target is not None:
            advice.plan.save(target)
        if not json:
            _print_advice(advice, name if phase != "all" else "", target, notes,
                          options["cluster"].num_nodes)
    if json:
        documents = {n: a.to_dict() | {"notes": [*a.notes, *notes]} for n, a in answers.items()}
        show.print_json(documents if phase == "apart" else next(iter(documents.values())))
    reports = {n: _report(n, advice, parts[n], options, notes) for n, advice in answers.items()}
    return reports if phase == "apart" else {"": next(iter(reports.values()))}


def _report(
    phase: str, advice: Advice, part: RoutingTrace, options: dict[str, Any], notes: tuple[str, ...]
) -> Report:
    from ..simulator.report.plan_report import plan_report, shown_plans
    from ..simulator.report.views import views_of

    cluster, dispatch = options["cluster"], options["dispatch"]
    return plan_report(
        advice, lambda: views_of(shown_plans(advice), part, cluster, dispatch,
                                 options["steps"]), cluster, notes,
        title=f"Plan for {phase}" if phase else "Plan",
    )


def _parts(
    path: Path, source: RoutingTrace, targets: dict[str, Path | None]
) -> dict[str, RoutingTrace]:
    """Phase -> its part of the trace; "" is all of it."""
    from ..errors import UsageError

    if "" not in targets and source.phase is None:
        raise UsageError(
            f"{path} does not tell prefill from decode: plan it as a whole (--phase all), or "
            "record a trace with phases"
        )
    return {
        name: source.slice_phase(name) if name else source  # type: ignore[arg-type]
        for name in targets
    }


@contextmanager
def _progress() -> Iterator[Any]:
    """A callback (method, done, of, gap so far) that draws a bar per method."""
    with show.progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(method: str, done: int, total: int, gap: float | None) -> None:
            if method not in tasks:
                tasks[method] = bar.add_task(method, total=total)
            text = "searching layers" if gap is None else f"layers planned, gap {gap:.1%}"
            bar.update(tasks[method], completed=done, description=f"{method}: {text}")

        yield progress


def _advise(trace: RoutingTrace, options: dict[str, Any]) -> Advice:
    from ..placement.rebalancing.advise import CURRENT, advise

    with _progress() as progress:
        advice = advise(trace, progress=progress, **options)
    assert advice.chosen == CURRENT or advice.chosen in advice.results
    return advice


def _print_advice(
    advice: Advice, name: str, target: Path | None, notes: tuple[str, ...], nodes: int
) -> None:
    show.print_verdict((f"{name}: " if name else "") + advice.verdict)
    rows = [_advice_row(advice, row.name, nodes) for row in advice.comparison.rows]
    rows += [("  " + n, *(["cannot"] + [None] * 7)) for n in advice.cannot]
    columns = ("plan", show.metric(advice.comparison.metric_name), "change, %", "p99 imbalance",
               "node transfers" if nodes > 1 else "device transfers", "bound", "gap", "seconds",
               "replicas")
    show.print_table("* = use this", columns, rows)
    _print_moving(advice.moving)
    _print_moves(advice.results)
    priced = any(moving.us is not None for moving in advice.moving.values())
    show.print_notes((
        *advice.notes[:1],
        "bound: no plan can be better on the planning steps; gap: how far above it this one is",
        *([f"pays back after: steps until the significant gain, the low end of its band, pays "
           f"for the moves; at most --horizon {advice.horizon_steps:,.0f}"] if priced else []),
        *advice.notes[1:], *notes,
    ))
    _print_written(advice.chosen, target)


def _advice_row(advice: Advice, name: str, nodes: int) -> tuple[Any, ...]:
    row = advice.comparison.row(name)
    result, judged = advice.results.get(name), advice.comparison.evaluations[name]
    return (
        ("* " if name == advice.chosen else "  ") + name, row.metric,
        show.band(row.change_percent, row.change_low_percent, row.change_high_percent),
        judged.imbalance_p99,
        judged.remote_node_copies_per_token if nodes > 1
        else judged.remote_device_copies_per_token,
        None if result is None else result.evidence.bound,
        None if result is None else f"{result.evidence.gap:.2%}",
        None if result is None else result.seconds,
        advice.plans[name].spare_slots,
    )


def _print_moving(moving: dict[str, Moving]) -> None:
    """What coming from the current plan to each other one takes."""
    if not moving:
        return
    rows: list[tuple[Any, ...]] = []
    for name, taken in moving.items():
        steps = taken.pays_back_after_steps
        rows.append((
            "  " + name, taken.moves, f"{taken.share:.1%}",
            None if taken.bytes is None else size(taken.bytes),
            None if taken.us is None else taken.us / 1e3, taken.significant_gain_us,
            None if steps is None else f"{steps:,.0f} steps",
        ))
    columns = ("plan", "experts to send", "of its slots", "bytes", "transfer, ms",
               "significant gain, us", "pays back after")
    known = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    show.print_table("from the current plan", [columns[i] for i in known],
                     [[row[i] for i in known] for row in rows])


def _print_moves(results: dict[str, PlanResult]) -> None:
    """The ordered moves of a plan within a budget."""
    for result in results.values():
        if not result.moves:
            continue
        shown = result.moves[:MOST_MOVES_SHOWN]
        more = len(result.moves) - len(shown)
        show.print_table(
            "moves, best gain first" + (f" ({more} more in --json)" if more else ""),
            ("move", "layer", "expert", "to device"),
            [(str(i + 1), layer, expert, device)
             for i, (layer, device, expert) in enumerate(shown)],
        )


def _print_written(name: str, target: Path | None) -> None:
    if target is not None:
        show.print_text(f"wrote {name} to {target}")


# ---- average loads ----------------------------------------------------------------------------


def _answer_loads(
    profile: Profile, target: Path | None, options: dict[str, Any], notes: tuple[str, ...], *,
    json: bool,
) -> Report:
    """A load-only dump: plans for average loads, judged on them alone."""
    from ..placement.rebalancing.advise_loads import advise_loads
    from ..simulator.report.plan_report import loads_report

    unused = ("steps", "horizon_steps")         # loads have no steps to sample, nor times
    with _progress() as progress:
        advice = advise_loads(
            profile, progress=progress, **{k: v for k, v in options.items() if k not in unused}
        )
    if target is not None:
        advice.plan.save(target)
    if json:
        show.print_json(advice.to_dict() | {"notes": [*advice.notes, *notes]})
    else:
        _print_loads(advice, target, notes)
    return loads_report(advice, profile.load_WLE.sum(axis=0), options["cluster"], notes)


def _print_loads(advice: LoadAdvice, target: Path | None, notes: tuple[str, ...]) -> None:
    show.print_verdict(advice.verdict)
    rows: list[tuple[Any, ...]] = [
        (("* " if name == advice.chosen else "  ") + name, found.evidence.objective,
         found.evidence.bound, f"{found.evidence.gap:.2%}", found.seconds,
         found.plan.spare_slots)
        for name, found in advice.results.items()
    ]
    rows += [("  " + name, "cannot", *[None] * 4) for name in advice.cannot]
    columns = ("plan", "imbalance", "bound", "gap", "seconds", "replicas")
    show.print_table("* = use this", columns, rows)
    _print_moving(advice.moving)
    _print_moves(advice.results)
    show.print_notes((
        "bound: no plan can be better on these loads; gap: how far above it this one is",
        *advice.notes, *notes,
    ))
    _print_written(advice.chosen, target)
