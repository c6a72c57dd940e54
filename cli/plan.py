"""`plan`: options in, advice out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..app.inputs import (
    build_cluster,
    build_executor,
    build_sampler,
    load_plan,
    model_notes,
    read_model,
    read_routing,
    require_target,
)
from . import options as opt
from .reports import ReportFile, ReportPictures, require_report_targets, write_reports

PHASES = ("all", "prefill", "decode", "apart")


def plan(
    trace: opt.TraceArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Plan file to write.")] = None,
    current: Annotated[
        Path | None,
        typer.Option(help="The active plan: it stays unless another is better beyond the noise "
                     "and, with --model, pays back its moves within --horizon."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method to try; may repeat: auto, contiguous, round_robin, eplb, "
            "eplb_hierarchical, greedy, lpt_swap, anticorrelation, affinity or moetuner "
            "[default: auto, eplb, greedy, contiguous]."
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="time or balance [default: time with --model].")
    ] = None,
    dispatch: Annotated[
        str | None,
        typer.Option(
            help="How tokens choose among replicas: even, nearest, balanced, fewest_active, or an "
            "engine's own (sglang_static, sglang_dynamic, sglang_rows, vllm_hash, "
            "trtllm_round_robin, ascend_fixed) [default: that of --current, else balanced]."
        ),
    ] = None,
    max_moves: Annotated[
        int | None, typer.Option(help="With --current: move at most so many experts.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="With --current and --model: move at most so many bytes.")
    ] = None,
    horizon: Annotated[
        float, typer.Option(help="With --current and --model: steps within which moves must pay.")
    ] = 10_000,
    phase: Annotated[
        str, typer.Option(help="all, prefill, decode, or apart (a plan for each).")
    ] = "all",
    effort: Annotated[str, typer.Option(help="fast, normal or thorough.")] = "normal",
    time_limit: Annotated[
        float | None,
        typer.Option(help="Seconds of planning and judging, all methods together; then the best "
                     "plans so far."),
    ] = None,
    cluster: opt.ClusterFile = None,
    preset: opt.Preset = "h100",
    nodes: opt.Nodes = 1,
    devices_per_node: opt.DevicesPerNode = 8,
    slots_per_device: opt.SlotsPerDevice = None,
    traffic: opt.TrafficMode = "return_home/per_expert",
    oversubscription: opt.Oversubscription = None,
    reserve_bytes: opt.ReservedBytes = None,
    model: opt.ModelSource = None,
    moe_layers: opt.MoeLayers = None,
    step_tokens: opt.StepTokens = 512,
    concurrency: opt.Concurrency = 64,
    order: opt.Order = "interleaved",
    num_experts: opt.NumExperts = None,
    axes: opt.Axes = None,
    layers: opt.Layers = None,
    address: opt.Address = None,
    report: ReportFile = None,
    report_png: ReportPictures = None,
    seed: opt.Seed = 0,
    json: opt.Json = False,
) -> None:
    """Plan placement, replicas and dispatch; say what the plan is worth before anyone moves."""
    from ..placement.memory import NOT_CHECKED
    from .advise import answer

    _check_asked(phase, current, (max_moves, max_bytes), method, horizon, time_limit)
    targets = _targets(out, phase)
    require_report_targets(report, report_png, targets if phase == "apart" else ("",))
    current_plan = load_plan(current)
    spec = read_model(model, moe_layers)
    source, notes = read_routing(trace, num_experts, model=spec, axes=axes, layers=layers)
    notes += model_notes(spec)
    own_dispatch: Any = "balanced" if current_plan is None else current_plan.dispatch
    if slots_per_device is None and current_plan is not None:
        slots_per_device = current_plan.slots_per_device
    place, told = build_cluster(cluster, preset, nodes, devices_per_node, slots_per_device, traffic,
                                source.num_experts, oversubscription, reserve_bytes, spec)
    notes += told if spec is not None and spec.knows_bytes else (NOT_CHECKED,)
    options: dict[str, Any] = {
        "cluster": place,
        "current": current_plan, "max_moves": max_moves, "max_bytes": max_bytes,
        "model": spec, "dispatch": dispatch or own_dispatch,
        "objective": objective, "effort": effort, "seed": seed,
        "steps": build_sampler(step_tokens, concurrency, order, 0), "horizon_steps": horizon,
        "executor": build_executor(address),
        **({"methods": method} if method else {}),
    }
    reports = answer(trace, source, phase, targets, options, time_limit, notes, json=json)
    write_reports(reports, report, report_png)


def _check_asked(
    phase: str, current: Path | None, budget: tuple[int | None, int | None],
    method: list[str] | None, horizon: float, time_limit: float | None,
) -> None:
    """Raises UsageError on options that mean nothing together."""
    from ..errors import UsageError

    if phase not in PHASES:
        raise UsageError(f"unknown phase {phase!r}: {', '.join(PHASES[:-1])} or {PHASES[-1]}")
    for name, value in zip(("--max-moves", "--max-bytes"), budget, strict=True):
        if value is not None and current is None:
            raise UsageError(f"{name} counts moves away from a plan: name it with --current")
        if value is not None and method:
            raise UsageError(f"{name} starts from the active plan: leave --method out")
    if not horizon > 0:
        raise UsageError(f"--horizon {horizon} must be above 0")
    if time_limit is not None and not time_limit > 0:
        raise UsageError(f"--time-limit {time_limit} must be above 0")


def _targets(out: Path | None, phase: str) -> dict[str, Path | None]:
    """Phase ("" = all together) -> file to write; none of them exists, each can be written."""
    parts = {"all": ("",), "apart": ("prefill", "decode")}.get(phase, (phase,))
    targets: dict[str, Path | None] = {}
    for part in parts:
        target = out
        if out is not None and phase == "apart":
            target = out.with_suffix(f".{part}{out.suffix or '.json'}")
        require_target(target)
        targets[part] = target
    return targets
