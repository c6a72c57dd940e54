"""`evaluate`: plans side by side on a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app.inputs import build_cluster, build_sampler, read_model, read_trace
from . import output as show
from .options import (
    ClusterFile,
    Concurrency,
    Json,
    ModelSource,
    Nodes,
    NumExperts,
    Order,
    Oversubscription,
    Preset,
    Seed,
    StepTokens,
    TraceArgument,
    TrafficMode,
)

if TYPE_CHECKING:
    from ..placement.comparison.compare import Comparison


def register(app: typer.Typer) -> None:
    """Put the verb on the root command."""
    app.command()(evaluate)


def evaluate(
    trace: TraceArgument,
    plans: Annotated[list[Path], typer.Argument(help="Plan files.")],
    current: Annotated[
        Path | None, typer.Option(help="Compare with this plan; exit 4 if the first is worse.")
    ] = None,
    dispatch: Annotated[
        str | None, typer.Option(help="Judge all under this dispatch [default: each its own].")
    ] = None,
    cluster: ClusterFile = None,
    preset: Preset = "h100",
    nodes: Nodes = 1,
    devices_per_node: Annotated[
        int | None, typer.Option(help="Devices in each node [default: the first plan's].")
    ] = None,
    traffic: TrafficMode = "return_home/per_expert",
    oversubscription: Oversubscription = None,
    model: ModelSource = None,
    step_tokens: StepTokens = 512,
    concurrency: Concurrency = 64,
    order: Order = "interleaved",
    num_experts: NumExperts = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Judge plans on a trace, side by side on the same steps, with confidence bands."""
    from ..errors import UsageError
    from ..placement.comparison.compare import compare
    from ..placement.plan import Plan

    named = {path.stem: Plan.load(path) for path in plans}
    if len(named) != len(plans):
        raise UsageError("two plan files share a name: rename one, names label the rows")
    first = next(iter(named))
    reference = None
    if current is not None:
        reference = "current" if current.stem in named else current.stem
        named[reference] = Plan.load(current)
    routing, notes = read_trace(trace, num_experts)
    if devices_per_node is None:
        devices_per_node = -(-named[first].num_devices // max(nodes, 1))
    place = build_cluster(
        cluster, preset, nodes, devices_per_node,
        max(plan.slots_per_device for plan in named.values()), traffic, routing.num_experts,
        oversubscription,
    )
    table = compare(
        named, routing, place,
        steps=build_sampler(step_tokens, concurrency, order, 0),
        dispatch=dispatch, model=read_model(model), seed=seed, current=reference,
    )
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
