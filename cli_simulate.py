"""`simulate`, `whatif`, `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_output as show
from .cli_options import (
    ClusterFile,
    DevicesPerNode,
    Json,
    Nodes,
    Preset,
    Seed,
    TrafficMode,
    build_cluster,
    read_model,
    read_trace,
    require_new,
)


def register(app: typer.Typer) -> None:
    """Put the verbs of this file on the root command."""
    app.command()(simulate)


def simulate(
    trace: Annotated[Path, typer.Argument(help="Trace folder or array file: how tokens route.")],
    plans: Annotated[list[Path], typer.Argument(help="Plan files; all serve the same requests.")],
    model: Annotated[
        Path, typer.Option(help="Checkpoint folder, or a ModelSpec as JSON: sizes make times.")
    ],
    arrivals: Annotated[
        Path | None, typer.Option(help="Azure .csv or Mooncake .jsonl [default: Poisson].")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests, at most.")] = 1000,
    rate: Annotated[float, typer.Option(help="Poisson arrivals per second.")] = 5.0,
    prompt_tokens: Annotated[float, typer.Option(help="Mean prompt length (Poisson).")] = 1024,
    output_tokens: Annotated[float, typer.Option(help="Mean output length (Poisson).")] = 128,
    cluster: ClusterFile = None,
    preset: Preset = "h100",
    nodes: Nodes = 1,
    devices_per_node: DevicesPerNode = 8,
    traffic: TrafficMode = "return_home/per_expert",
    report: Annotated[Path | None, typer.Option(help="HTML report to write.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Serve a workload under each plan, in simulation: latency, throughput and blame."""
    from .errors import UsageError
    from .placement.plan import Plan
    from .simulator.serve import simulate as serve
    from .simulator.workload import as_workload
    from .traces.arrivals import Length, load_arrivals, poisson

    require_new(report)
    named = {path.stem: Plan.load(path) for path in plans}
    if len(named) != len(plans):
        raise UsageError("two plan files share a name: rename one, names label the rows")
    routing, notes = read_trace(trace)
    spec = read_model(model)
    assert spec is not None
    first = next(iter(named.values()))
    place = build_cluster(cluster, preset, nodes, devices_per_node, first.slots_per_device,
                          traffic, routing.num_experts)
    source = poisson(
        requests, rate, prompt=Length(prompt_tokens, 1.0), output=Length(output_tokens, 1.0),
        seed=seed,
    ) if arrivals is None else load_arrivals(arrivals)
    load = as_workload(source).head(requests)
    results = {}
    with show.progress_bar() as bar:
        task = bar.add_task("serving under each plan", total=len(named))
        for name, plan in named.items():
            results[name] = serve(plan, load, place, trace=routing, model=spec, seed=seed)
            bar.advance(task)
    if json:
        show.print_json({n: r.to_dict() for n, r in results.items()} | {"notes": list(notes)})
    else:
        _print(results, notes)
    if report is not None:
        _write_report(report, results, named, routing, place)


COLUMNS = ("plan", "latency p50", "p99", "first token p50", "p99", "per token p50",
           "output tokens/s", "step mean", "devices busy")


def _verdict(results: dict[str, Any]) -> str:
    best = _ranked(results)[0]
    return (
        f"{best}: mean latency {results[best].latency.mean / 1e6:.3f} s, "
        f"{results[best].output_tokens_per_s:,.0f} output tokens/s"
    )


def _ranked(results: dict[str, Any]) -> list[str]:
    return sorted(results, key=lambda n: results[n].latency.mean)


def _rows(results: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Milliseconds, best mean latency first."""
    rows = []
    for name in _ranked(results):
        r = results[name]
        rows.append((
            name, r.latency.p50 / 1e3, r.latency.p99 / 1e3, r.ttft.p50 / 1e3, r.ttft.p99 / 1e3,
            None if r.tpot is None else r.tpot.p50 / 1e3, r.output_tokens_per_s,
            r.step_time.mean / 1e3, float(r.device_busy_G.mean()),
        ))
    return rows


def _print(results: dict[str, Any], notes: tuple[str, ...]) -> None:
    show.print_verdict(_verdict(results))
    show.print_table("milliseconds", COLUMNS, _rows(results))
    show.print_notes(dict.fromkeys((*notes, *(n for r in results.values() for n in r.notes))))


def _write_report(
    path: Path, results: dict[str, Any], plans: dict[str, Any], routing: Any, cluster: Any
) -> None:
    from .simulator.report.page import render_report, write_report
    from .simulator.report.views import plan_views

    page = render_report(
        title="Loadmaster simulation", verdict=_verdict(results), results=results,
        views=plan_views(plans, routing, cluster),
        notes=("loads and traffic: steps of 512 tokens, 64 requests in flight, from the trace",),
    )
    write_report(path, page)
