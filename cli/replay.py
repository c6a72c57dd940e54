"""`replay`: a recorded run's own steps under each plan, with a clock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..app.inputs import build_sampler, load_plan, plans_cluster, read_model, read_plans, read_trace
from ..app.serving import build_overlap
from . import output as show
from .options import (
    ClusterFile,
    Concurrency,
    Json,
    Nodes,
    NumExperts,
    Oversubscription,
    Preset,
    Seed,
    StepTokens,
    TraceArgument,
    TrafficMode,
)
from .serving_options import Dispatch, OverlapName, whole
from .simulate_print import print_blame

if TYPE_CHECKING:
    from ..placement.plan import Plan
    from ..simulator.serving.replay import Replay


def register(app: typer.Typer) -> None:
    """Put the verb on the root command."""
    app.command()(replay)


def replay(
    trace: TraceArgument,
    plans: Annotated[list[Path], typer.Argument(help="Plan files; all play the same steps.")],
    model: Annotated[
        Path, typer.Option(help="Checkpoint folder, or a ModelSpec as JSON: sizes make times.")
    ],
    current: Annotated[
        Path | None, typer.Option(help="The active plan: the verdict compares the others with it.")
    ] = None,
    dispatch: Dispatch = None,
    arrivals: Annotated[
        Path | None,
        typer.Option(help="When requests came, .csv or .jsonl: the n-th row is the trace's n-th "
                     "request [default: nothing waits]."),
    ] = None,
    overlap: OverlapName = "none",
    cluster: ClusterFile = None,
    preset: Preset = "h100",
    nodes: Nodes = 1,
    devices_per_node: Annotated[
        int | None, typer.Option(help="Devices in each node [default: the first plan's].")
    ] = None,
    traffic: TrafficMode = "return_home/per_expert",
    oversubscription: Oversubscription = None,
    step_tokens: StepTokens = 512,
    concurrency: Concurrency = 64,
    order: Annotated[
        str | None,
        typer.Option(help="recorded, interleaved, shuffled or stored [default: recorded where the "
                     "trace has steps, else interleaved]."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps to play, at most.",
                                 callback=whole("--max-steps", 1))
    ] = None,
    num_experts: NumExperts = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Play a recorded run's own steps under each plan: the same steps, so paired, with a clock."""
    from ..simulator.serving.replay import arrivals_of
    from ..simulator.serving.replay import replay as play
    from ..traces.arrivals import load_arrivals

    named, reference = _with_current(read_plans(plans), current)
    routing, notes = read_trace(trace, num_experts)
    spec = read_model(model)
    assert spec is not None
    place = plans_cluster(named, cluster, preset, nodes, devices_per_node, traffic, routing,
                          oversubscription)
    order = order or ("recorded" if routing.step is not None else "interleaved")
    came = None if arrivals is None else arrivals_of(routing, load_arrivals(arrivals))
    with show.progress_bar() as bar:
        bar.add_task("playing the steps under each plan", total=None)
        played = play(
            named, routing, place, model=spec, dispatch=dispatch, arrival_us=came,
            steps=build_sampler(step_tokens, concurrency, order, 0), max_steps=max_steps,
            overlap=build_overlap(overlap), current=reference, seed=seed,
        )
    if json:
        document = {"verdict": played.comparison.verdict} | played.to_dict()
        show.print_json(document | {"notes": [*notes, *_notes(played)]})
    else:
        _print(played, notes)


def _with_current(
    named: dict[str, Plan], current: Path | None
) -> tuple[dict[str, Plan], str | None]:
    """The plans, the active one among them; the name of that one."""
    plan = load_plan(current)
    if plan is None or current is None:
        return named, None
    name = "current" if current.stem in named else current.stem
    return named | {name: plan}, name


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
