"""`simulate`: serve the same requests under each plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..app.inputs import (
    model_notes,
    plans_cluster,
    read_model,
    read_plans,
    read_trace,
    require_targets,
    writing,
)
from ..app.serving import build_interventions, build_serving, build_slo, build_workload
from . import options as opt
from . import output as show
from . import serving_options as serve
from .reports import ReportFile, ReportPictures, require_report_targets, write_reports
from .simulate_print import print_served

MOST_SHOWN = 2               # plans whose loads and traffic a report draws


def simulate(
    trace: opt.RoutingArgument,
    plans: Annotated[list[Path], typer.Argument(help="Plan files; all serve the same requests.")],
    model: opt.SizedModel,
    moe_layers: opt.MoeLayers = None,
    dispatch: serve.Dispatch = None,
    arrivals: serve.ArrivalsFile = None,
    arrivals_unit: serve.ArrivalsUnit = None,
    requests: serve.Requests = 1000,
    rate: serve.Rate = 5.0,
    prompt_tokens: serve.PromptTokens = 1024,
    output_tokens: serve.OutputTokens = 128,
    slo_ttft_ms: serve.SloTtftMs = None,
    slo_tpot_ms: serve.SloTpotMs = None,
    step_tokens: serve.TokenBudget = 8192,
    max_requests: serve.MaxRequests = None,
    prefill: serve.Prefill = "chunked",
    kv_bytes_per_token: serve.KvBytesPerToken = None,
    other_bytes: serve.OtherBytes = None,
    groups: serve.Groups = 1,
    overlap: serve.OverlapName = "none",
    other_us_per_token: serve.OtherUsPerToken = 0.0,
    faults: serve.FaultsPath = None,
    policy: serve.PolicyName = None,
    every_steps: serve.EverySteps = 1000,
    cluster: opt.ClusterFile = None,
    preset: opt.Preset = "h100",
    nodes: opt.Nodes = 1,
    devices_per_node: opt.PlansDevicesPerNode = None,
    traffic: opt.TrafficMode = "return_home/per_expert",
    oversubscription: opt.Oversubscription = None,
    reserve_bytes: opt.ReservedBytes = None,
    report: ReportFile = None,
    report_png: ReportPictures = None,
    trace_out: Annotated[
        Path | None, typer.Option(help="Chrome trace of the first plan (opens in Perfetto).")
    ] = None,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> None:
    """Serve a workload under each plan, in simulation: who is faster beyond the noise, and why."""
    from ..placement.cost.evaluate import resolve_dispatch
    from ..simulator.pricing.step_router import StepRouter
    from ..simulator.report.chrome_trace import write_chrome_trace
    from ..simulator.report.simulate_report import simulate_report
    from ..simulator.report.views import views_of
    from ..simulator.serving.compare_served import serve_each

    require_targets(report, trace_out)
    require_report_targets(report, report_png)
    slo = build_slo(slo_ttft_ms, slo_tpot_ms)
    named = read_plans(plans)
    spec = read_model(model, moe_layers)
    routing, notes = read_trace(trace, model=spec)
    notes += model_notes(spec)
    assert spec is not None
    service = build_serving(step_tokens, max_requests, prefill, kv_bytes_per_token, other_bytes,
                            groups, overlap, other_us_per_token, spec)
    place = plans_cluster(named, cluster, preset, nodes, devices_per_node, traffic, routing,
                          oversubscription, reserve_bytes)
    interventions = build_interventions(faults, policy, every_steps, place, groups)
    load, told = build_workload(arrivals, requests, rate, prompt_tokens, output_tokens, seed,
                                arrivals_unit)
    notes = (*notes, *told)
    name, first = next(iter(named.items()))
    router = StepRouter(routing, place, spec, dispatch=resolve_dispatch(dispatch, first),
                        overlap=service.overlap)
    with show.progress_bar() as bar:
        task = bar.add_task("serving under each plan", total=len(named))
        served = serve_each(
            named, load, place, trace=routing, model=spec, dispatch=dispatch, serving=service,
            slo=slo, interventions=interventions, seed=seed, progress=lambda: bar.advance(task),
        )
    shown = dict(list(named.items())[:MOST_SHOWN])
    page = simulate_report(
        served, lambda: views_of(shown, routing, place, dispatch), place, notes
    )
    write_reports({"": page}, report, report_png)
    if trace_out is not None:
        with writing(trace_out):
            write_chrome_trace(trace_out, served.results[name], first, router)
    if json:
        show.print_json(served.to_dict() | {"notes": [*notes, *served.notes]})
    else:
        print_served(served, notes)

