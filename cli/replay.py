"""`replay`: a recorded run's own steps under each plan, with a clock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app.inputs import (
    build_sampler,
    model_notes,
    plans_cluster,
    read_model,
    read_plans,
    read_trace,
    with_current,
)
from ..app.serving import build_overlap
from . import options as opt
from . import output as show
from .reports import ReportFile, ReportPictures, require_report_targets, write_reports
from .serving_options import ArrivalsUnit, Dispatch, OverlapName, whole
from .simulate_print import print_blame

if TYPE_CHECKING:
    from ..simulator.serving.replay import Replay


def replay(
    trace: opt.TraceArgument,
    plans: Annotated[list[Path], typer.Argument(help="Plan files; all play the same steps.")],
    model: opt.SizedModel,
    moe_layers: opt.MoeLayers = None,
    current: Annotated[
        Path | None, typer.Option(help="The active plan: the verdict compares the others with it.")
    ] = None,
    dispatch: Dispatch = None,
    arrivals: Annotated[
        Path | None,
        typer.Option(help="When requests came, .csv or .jsonl: the n-th row is the trace's n-th "
                     "request [default: nothing waits]."),
    ] = None,
    arrivals_unit: ArrivalsUnit = None,
    overlap: OverlapName = "none",
    cluster: opt.ClusterFile = None,
    preset: opt.Preset = "h100",
    nodes: opt.Nodes = 1,
    devices_per_node: opt.PlansDevicesPerNode = None,
    traffic: opt.TrafficMode = "return_home/per_expert",
    oversubscription: opt.Oversubscription = None,
    reserve_bytes: opt.ReservedBytes = None,
    step_tokens: opt.StepTokens = 512,
    concurrency: opt.Concurrency = 64,
    order: Annotated[
        str | None,
        typer.Option(help="recorded, interleaved, shuffled or stored [default: recorded where the "
                     "trace has steps, else interleaved]."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps to play, at most.",
                                 callback=whole("--max-steps", 1))
    ] = None,
    num_experts: opt.NumExperts = None,
    report: ReportFile = None,
    report_png: ReportPictures = None,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> None:
    """Play a recorded run's own steps under each plan: the same steps, so paired, with a clock."""
    from ..simulator.report.replay_report import replay_report
    from ..simulator.serving.replay import arrivals_of
    from ..simulator.serving.replay import replay as play
    from ..traces.arrival_files import load_arrivals

    require_report_targets(report, report_png)
    named, reference = with_current(read_plans(plans), current)
    spec = read_model(model, moe_layers)
    routing, notes = read_trace(trace, num_experts, model=spec)
    notes += model_notes(spec)
    assert spec is not None
    place = plans_cluster(named, cluster, preset, nodes, devices_per_node, traffic, routing,
                          oversubscription, reserve_bytes)
    order = order or ("recorded" if routing.step is not None else "interleaved")
    came = None
    if arrivals is not None:
        read = load_arrivals(arrivals, unit=arrivals_unit)
        came, notes = arrivals_of(routing, read), (*notes, *read.notes)
    with show.progress_bar() as bar:
        bar.add_task("playing the steps under each plan", total=None)
        played = play(
            named, routing, place, model=spec, dispatch=dispatch, arrival_us=came,
            steps=build_sampler(step_tokens, concurrency, order, 0), max_steps=max_steps,
            overlap=build_overlap(overlap), current=reference, seed=seed,
        )
    write_reports({"": replay_report(played, notes)}, report, report_png)
    if json:
        document = {"verdict": played.comparison.verdict} | played.to_dict()
        show.print_json(document | {"notes": [*notes, *_notes(played)]})
    else:
        _print(played, notes)


def _print(played: Replay, notes: tuple[str, ...]) -> None:
    table = played.comparison
    show.print_verdict(table.verdict)
    rows = []
    for row in table.rows:
        own = played.plans[row.name]
        rows.append((
            row.name, own.step_time.mean / 1e3,
            show.band(row.change_percent, row.change_low_percent, row.change_high_percent),
            own.step_time.p99 / 1e3, own.total_us / 1e6, own.latency.mean / 1e3,
            own.latency.p50 / 1e3, own.latency.p99 / 1e3,
        ))
    show.print_table(
        "milliseconds; a request lasts from its first step to its last",
        ("plan", "step mean", f"% vs {table.reference}", "p99", "all steps, s", "request mean",
         "p50", "p99"), rows,
    )
    print_blame({row.name: played.plans[row.name].blame for row in table.rows})
    show.print_notes((
        f"{table.steps} steps, worth {table.independent_steps:.0f} independent ones; "
        f"{table.method}, {table.resamples} resamples", *notes, *_notes(played),
    ))


def _notes(played: Replay) -> tuple[str, ...]:
    plans = played.plans.values()
    return (*played.notes, *played.comparison.notes, *(n for p in plans for n in p.notes))
