"""`evaluate`: plans side by side on a trace."""

from __future__ import annotations

from dataclasses import replace
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
from ..app.offers import with_offer
from . import options as opt
from . import output as show
from .reports import ReportFile, ReportPictures, require_report_targets, write_reports

if TYPE_CHECKING:
    from ..placement.comparison.compare import Comparison


def evaluate(
    trace: opt.TraceArgument,
    plans: Annotated[list[Path], typer.Argument(help="Plan files.")],
    current: Annotated[
        Path | None, typer.Option(help="Compare with this plan; exit 4 if the first is worse.")
    ] = None,
    dispatch: Annotated[
        str | None, typer.Option(help="Judge all under this dispatch [default: each its own].")
    ] = None,
    cluster: opt.ClusterFile = None,
    preset: opt.Preset = "h100",
    nodes: opt.Nodes = 1,
    devices_per_node: opt.PlansDevicesPerNode = None,
    traffic: opt.TrafficMode = "return_home/per_expert",
    oversubscription: opt.Oversubscription = None,
    reserve_bytes: opt.ReservedBytes = None,
    model: opt.ModelSource = None,
    moe_layers: opt.MoeLayers = None,
    step_tokens: opt.StepTokens = 512,
    concurrency: opt.Concurrency = 64,
    order: opt.Order = "interleaved",
    num_experts: opt.NumExperts = None,
    report: ReportFile = None,
    report_png: ReportPictures = None,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> None:
    """Judge plans on a trace, side by side on the same steps, with confidence bands."""
    from ..placement.comparison.compare import compare
    from ..simulator.report.evaluate_report import evaluate_report, shown_names
    from ..simulator.report.views import views_of

    require_report_targets(report, report_png)
    named, reference = with_current(read_plans(plans), current)
    first = next(iter(named))
    spec = read_model(model, moe_layers)
    routing, notes = read_trace(trace, num_experts, model=spec)
    notes += model_notes(spec)
    place = plans_cluster(named, cluster, preset, nodes, devices_per_node, traffic, routing,
                          oversubscription, reserve_bytes)
    sampler = build_sampler(step_tokens, concurrency, order, 0)
    table = compare(
        named, routing, place,
        steps=sampler,
        dispatch=dispatch, model=spec, seed=seed, current=reference,
    )
    table = replace(table, verdict=with_offer(table.verdict, routing, spec))
    shown = {name: named[name] for name in shown_names(table)}
    page = evaluate_report(
        table, lambda: views_of(shown, routing, place, dispatch, sampler), place, notes
    )
    write_reports({"": page}, report, report_png)
    if json:
        show.print_json(table.to_dict() | {"notes": [*notes, *table.notes]})
    else:
        _print_comparison(table, notes)
    if reference is not None and table.worse_than_reference(first):
        raise typer.Exit(4)


def _print_comparison(table: Comparison, notes: tuple[str, ...]) -> None:
    show.print_verdict(table.verdict)
    rows = []
    for row in table.rows:
        judged = table.evaluations[row.name]
        rows.append((
            row.name, row.metric, f"± {show.figure((row.metric_high - row.metric_low) / 2)}",
            show.band(row.change_percent, row.change_low_percent, row.change_high_percent),
            judged.imbalance_mean, judged.imbalance_p99, judged.imbalance_worst,
            judged.remote_device_copies_per_token, judged.remote_node_copies_per_token,
            judged.active_experts_per_device,
        ))
    show.print_table(
        "", ("plan", show.metric(table.metric_name), "95 %", f"% vs {table.reference}",
             "imbalance", "p99", "worst", "device transfers", "node transfers", "active"), rows,
    )
    show.print_notes((
        f"{table.steps} steps, worth {table.independent_steps:.0f} independent ones; "
        f"{table.method}, {table.resamples} resamples", *notes, *table.notes,
    ))
