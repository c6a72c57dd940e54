"""`whatif`: sweep scenarios."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..app.inputs import (
    build_executor,
    model_notes,
    read_model,
    read_trace,
    require_targets,
    writing,
)
from ..app.serving import build_workload
from . import output as show
from .options import Address, Json, MoeLayers, RoutingArgument, Seed, SizedModel
from .reports import ReportFile, ReportPictures, require_report_targets, write_reports
from .serving_options import (
    ArrivalsFile,
    ArrivalsUnit,
    OutputTokens,
    PromptTokens,
    Rate,
    Requests,
    above_zero,
)

if TYPE_CHECKING:
    from ..simulator.whatif.run import WhatIf


def whatif(
    trace: RoutingArgument,
    grid: Annotated[
        Path, typer.Argument(help="Grid of scenarios (YAML): `loadmaster example grid` has one.")
    ],
    model: SizedModel,
    moe_layers: MoeLayers = None,
    arrivals: ArrivalsFile = None,
    arrivals_unit: ArrivalsUnit = None,
    requests: Requests = 300,
    rate: Rate = 5.0,
    prompt_tokens: PromptTokens = 1024,
    output_tokens: OutputTokens = 128,
    resume: Annotated[
        Path | None, typer.Option(help="Keep finished cells here; a second run goes on.")
    ] = None,
    out_csv: Annotated[Path | None, typer.Option("--csv", help="CSV to write.")] = None,
    rank_by: Annotated[str, typer.Option(help="Figure to rank by.")] = "latency_mean_us",
    time_limit: Annotated[
        float | None,
        typer.Option(help="Seconds after which no further scenario is begun.",
                     callback=above_zero("--time-limit")),
    ] = None,
    address: Address = None,
    report: ReportFile = None,
    report_png: ReportPictures = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Sweep scenarios: other devices, links, loads, methods, failures; ranked, with the front."""
    from ..errors import UsageError
    from ..foundation.atomic_file import replacing
    from ..simulator.report.whatif_report import whatif_report
    from ..simulator.whatif.grid import Grid
    from ..simulator.whatif.run import FIGURES, Study, run_whatif

    require_targets(out_csv, report)
    require_report_targets(report, report_png)
    if rank_by not in FIGURES:
        raise UsageError(f"--rank-by: no figure {rank_by!r}; there are: {', '.join(FIGURES)}")
    if out_csv is not None and resume is not None and out_csv.resolve() == resume.resolve():
        raise UsageError(f"{out_csv}: --csv and --resume name the same file: name two")
    scenarios = Grid.from_yaml(grid)
    spec = read_model(model, moe_layers)
    routing, notes = read_trace(trace, model=spec)
    notes += model_notes(spec)
    assert spec is not None
    load, told = build_workload(arrivals, requests, rate, prompt_tokens, output_tokens, seed,
                                arrivals_unit)
    notes = (*notes, *told)
    study = Study(scenarios, routing, spec, load)
    with show.progress_bar() as bar:
        task = bar.add_task("scenarios", total=None)
        table = run_whatif(
            study, executor=build_executor(address), resume=resume, rank_by=rank_by,
            time_limit_s=time_limit,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if out_csv is not None:
        with writing(out_csv), replacing(out_csv) as file:
            file.write(table.to_csv().encode())
    page = whatif_report(table, tuple(scenarios.axes), rank_by, notes)
    write_reports({"": page}, report, report_png)
    if json:
        show.print_json(table.to_dict() | {"notes": [*notes, *table.notes]})
    else:
        _print(table, scenarios.axes, rank_by, notes)
    if table.failed and len(table.failed) == len(table.cells):
        raise typer.Exit(1)


def _print(
    table: WhatIf, axes: dict[str, Any], rank_by: str, notes: tuple[str, ...]
) -> None:
    ranked, front = table.ranked(rank_by), {id(c) for c in table.pareto()}
    if ranked:
        best = ", ".join(f"{name} {ranked[0].fields[name]}" for name in axes)
        figure = f"{rank_by} {show.figure(ranked[0].figures[rank_by])}"
        show.print_verdict(f"{best}: {figure}" if best else figure)
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
    else:
        show.print_verdict("no scenario could be served")
    show.print_notes((*notes, *table.notes, *(
        f"failed: {', '.join(f'{a} {c.fields[a]}' for a in axes) or 'the base'}: {c.error}"
        for c in table.failed
    )))
