"""`simulate`, `whatif`, `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_output as show
from .cli_options import (
    Address,
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
    app.command()(whatif)
    app.command()(calibrate)


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
    trace_out: Annotated[
        Path | None, typer.Option(help="Chrome trace of the first plan (opens in Perfetto).")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Serve a workload under each plan, in simulation: latency, throughput and blame."""
    from .errors import UsageError
    from .placement.plan import Plan
    from .simulator.serve import simulate as serve

    require_new(report)
    require_new(trace_out)
    named = {path.stem: Plan.load(path) for path in plans}
    if len(named) != len(plans):
        raise UsageError("two plan files share a name: rename one, names label the rows")
    routing, notes = read_trace(trace)
    spec = read_model(model)
    assert spec is not None
    first = next(iter(named.values()))
    place = build_cluster(cluster, preset, nodes, devices_per_node, first.slots_per_device,
                          traffic, routing.num_experts)
    load = _workload(arrivals, requests, rate, prompt_tokens, output_tokens, seed)
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
    if trace_out is not None:
        from .simulator.report.chrome import write_chrome_trace
        from .simulator.routed import StepRouter

        name = next(iter(named))
        write_chrome_trace(trace_out, results[name], named[name], StepRouter(routing, place, spec))


def _workload(
    arrivals: Path | None, requests: int, rate: float, prompt_tokens: float, output_tokens: float,
    seed: int,
) -> Any:
    """The file's first requests, or a Poisson process."""
    from .simulator.workload import as_workload
    from .traces.arrivals import Length, load_arrivals, poisson

    source = poisson(
        requests, rate, prompt=Length(prompt_tokens, 1.0), output=Length(output_tokens, 1.0),
        seed=seed,
    ) if arrivals is None else load_arrivals(arrivals)
    return as_workload(source).head(requests)


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


def whatif(
    trace: Annotated[Path, typer.Argument(help="Trace folder or array file: how tokens route.")],
    grid: Annotated[Path, typer.Argument(help="Grid of scenarios (YAML): `base` and `axes`.")],
    model: Annotated[
        Path, typer.Option(help="Checkpoint folder, or a ModelSpec as JSON: sizes make times.")
    ],
    arrivals: Annotated[
        Path | None, typer.Option(help="Azure .csv or Mooncake .jsonl [default: Poisson].")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests, at most.")] = 300,
    rate: Annotated[float, typer.Option(help="Poisson arrivals per second.")] = 5.0,
    prompt_tokens: Annotated[float, typer.Option(help="Mean prompt length (Poisson).")] = 1024,
    output_tokens: Annotated[float, typer.Option(help="Mean output length (Poisson).")] = 128,
    resume: Annotated[
        Path | None, typer.Option(help="Keep finished cells here; a second run goes on.")
    ] = None,
    out_csv: Annotated[Path | None, typer.Option("--csv", help="CSV to write.")] = None,
    rank_by: Annotated[str, typer.Option(help="Figure to rank by.")] = "latency_mean_us",
    address: Address = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Sweep scenarios: other devices, links, loads, methods, failures; ranked, with the front."""
    from .simulator.whatif import Study, run_whatif
    from .simulator.whatif_grid import Grid

    require_new(out_csv)
    routing, notes = read_trace(trace)
    spec = read_model(model)
    assert spec is not None
    load = _workload(arrivals, requests, rate, prompt_tokens, output_tokens, seed)
    study = Study(Grid.from_yaml(grid), routing, spec, load)
    executor = None
    if address is not None:
        from .workers.jobs import RayExecutor

        executor = RayExecutor(address)
    with show.progress_bar() as bar:
        task = bar.add_task("scenarios", total=None)
        table = run_whatif(
            study, executor=executor, resume=resume, rank_by=rank_by,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if out_csv is not None:
        out_csv.write_text(table.to_csv(), encoding="utf-8")
    if json:
        show.print_json(table.to_dict() | {"notes": list(notes)})
    else:
        _print_whatif(table, study.grid.axes, rank_by)
    if table.failed and len(table.failed) == len(table.cells):
        raise typer.Exit(1)


def _print_whatif(table: Any, axes: dict[str, Any], rank_by: str) -> None:
    ranked, front = table.ranked(rank_by), {id(c) for c in table.pareto()}
    if ranked:
        best = ", ".join(f"{name} {ranked[0].fields[name]}" for name in axes)
        show.print_verdict(f"{best}: {rank_by} {show.figure(ranked[0].figures[rank_by])}")
        figures = list(dict.fromkeys((rank_by, *ranked[0].figures)))[:5]
        show.print_table(
            "+ = no other scenario is better in latency, devices and memory at once",
            (*axes, *(f.replace("_", " ") for f in figures), "front"),
            [
                (*(str(c.fields[a]) for a in axes), *(c.figures[f] for f in figures),
                 "+" if id(c) in front else "")
                for c in ranked
            ],
        )
    show.print_notes(
        "failed: " + ", ".join(f"{a} {c.fields[a]}" for a in axes) + f": {c.error}"
        for c in table.failed
    )


def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Hardware profile to write (YAML).")],
    model: Annotated[
        Path, typer.Option(help="Checkpoint folder, or a ModelSpec as JSON: the experts' shape.")
    ],
    ranks: Annotated[int, typer.Option(help="Processes that exchange tokens.")] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Measure this machine: experts alone, exchange between processes; fit a hardware profile."""
    import yaml

    from .errors import UsageError
    from .workers.calibration import calibrate_machine

    require_new(out)
    spec = read_model(model)
    if spec is None or not spec.knows_sizes:
        raise UsageError(f"{model}: calibrate needs the hidden and intermediate sizes")
    with show.progress_bar() as bar:
        task = bar.add_task("measuring", total=None)
        profile = calibrate_machine(
            spec, ranks=ranks, dtype=dtype,
            progress=lambda said: bar.update(task, description=said),
        )
    text = yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False)
    out.write_text(text, encoding="utf-8")
    if json:
        show.print_json(profile.model_dump(mode="json"))
        return
    show.print_verdict(f"wrote {out}: {profile.error}")
    compute = profile.compute
    show.print_table("experts", ("tokens on an expert", "us"), list(
        zip(map(int, compute.expert_table_tokens), compute.expert_table_us, strict=True)
    ))
    show.print_table("exchange", ("", "value"), [
        ("start, us", profile.dispatch.alpha_us),
        ("rate, GB/s", profile.dispatch.nvlink_bytes_per_s / 1e9),
        ("counts collective, us", profile.counts_collective_us),
    ])
