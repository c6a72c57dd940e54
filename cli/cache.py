"""`cache`: experts that do not fit on the device, and which policy keeps the right ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..app.inputs import build_cluster, build_sampler, model_notes, read_model, read_trace
from . import options as opt
from . import output as show
from .reports import ReportFile, ReportPictures, require_report_targets, write_reports
from .serving_options import whole, within

if TYPE_CHECKING:
    from ..simulator.cache.compare import CacheTable


def cache(
    trace: opt.TraceArgument,
    slots: Annotated[
        int, typer.Option(help="Experts that fit: in each layer, or in all with --shared.",
                          callback=whole("--slots", 1))
    ],
    model: opt.SizedModel,
    moe_layers: opt.MoeLayers = None,
    shared: Annotated[bool, typer.Option("--shared", help="All layers share the slots.")] = False,
    tier: Annotated[str, typer.Option(help="Where the others lie: host or disk.")] = "host",
    policy: Annotated[
        list[str] | None, typer.Option(help="Policy to play; may repeat [default: all].")
    ] = None,
    predictor: Annotated[
        list[str] | None,
        typer.Option(help="none, conditional or look_ahead; may repeat [default: all]."),
    ] = None,
    accuracy: Annotated[
        float, typer.Option(help="Of look_ahead.", callback=within("--accuracy", 0, 1))
    ] = 0.9,
    preset: opt.Preset = "h100",
    step_tokens: Annotated[
        int, typer.Option(help="Tokens in a step.", callback=whole("--step-tokens", 1))
    ] = 1,
    concurrency: opt.Concurrency = 1,
    order: opt.Order = "interleaved",
    max_steps: Annotated[
        int, typer.Option(help="Steps to play, at most.", callback=whole("--max-steps", 1))
    ] = 200,
    num_experts: opt.NumExperts = None,
    report: ReportFile = None,
    report_png: ReportPictures = None,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> None:
    """Keep some experts on one device, load the others when needed: hits and stalls by policy."""
    from ..errors import UsageError
    from ..simulator.cache.compare import PREDICTORS, compare_caches
    from ..simulator.cache.expert_cache import CacheTier
    from ..simulator.cache.policies import POLICIES
    from ..simulator.report.cache_report import cache_report

    require_report_targets(report, report_png)
    spec = read_model(model, moe_layers)
    routing, notes = read_trace(trace, num_experts, model=spec)
    notes += model_notes(spec)
    if spec is None or not spec.knows_sizes:
        raise UsageError(f"{model}: a cache needs the hidden and intermediate sizes")
    place, _ = build_cluster(None, preset, 1, 1, routing.num_experts, "return_home/per_expert",
                          routing.num_experts)
    room = CacheTier.of(slots, spec, place, tier=tier, shared=shared)  # type: ignore[arg-type]
    policies, predictors = policy or POLICIES, predictor or PREDICTORS
    with show.progress_bar() as bar:
        task = bar.add_task("playing", total=len(policies) * len(predictors))
        table = compare_caches(
            routing, room, spec, place, policies=policies, predictors=predictors,
            accuracy=accuracy, steps=build_sampler(step_tokens, concurrency, order, seed),
            max_steps=max_steps, seed=seed, progress=lambda: bar.advance(task),
        )
    write_reports({"": cache_report(table, notes)}, report, report_png)
    if json:
        show.print_json(table.to_dict() | {"notes": [*notes, *table.notes]})
    else:
        _print(table, notes)


def _print(table: CacheTable, notes: tuple[str, ...]) -> None:
    show.print_verdict(table.verdict)
    rows = []
    for row in table.rows:
        r = row.figures
        rows.append((
            row.name, 100 * r.hit_rate, r.stall_us / r.steps / 1e3, r.step_us / 1e3,
            f"{100 * r.stall_us / (r.stall_us + r.compute_us):.1f}", r.loads, r.prefetched,
            r.wasted,
        ))
    room = f"{table.tier.slots} slots in {'all layers' if table.tier.shared else 'each layer'}"
    show.print_table(
        f"{table.steps} steps, {room}, {table.tier.load_us:,.0f} us a load",
        ("policy", "hits, %", "stall, ms a step", "step, ms", "stall, %", "loads", "guessed right",
         "loaded in vain"), rows,
    )
    show.print_notes((*notes, *table.notes))
