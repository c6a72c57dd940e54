"""`plan`, `evaluate`, `plan-show`, `plan-diff`, `plan-export`, `plan-import`, `schema`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_output as show
from .cli_options import (
    Address,
    ClusterFile,
    Concurrency,
    DevicesPerNode,
    Dispatch,
    Json,
    ModelSource,
    Nodes,
    Order,
    Preset,
    Seed,
    SlotsPerDevice,
    StepTokens,
    TrafficMode,
    build_cluster,
    build_sampler,
    read_model,
    read_routing,
    read_trace,
    require_new,
)

if TYPE_CHECKING:
    from .placement.advise import Advice
    from .placement.comparison import Comparison
    from .placement.planner import PlanResult

TraceArgument = Annotated[Path, typer.Argument(help="Trace folder, array file or engine dump.")]
NumExperts = Annotated[
    int | None, typer.Option(help="Experts per layer, where the file does not say.")
]


def register(app: typer.Typer) -> None:
    """Put the verbs of this file on the root command."""
    app.command()(plan)
    app.command()(evaluate)
    app.command("plan-show")(plan_show)
    app.command("plan-diff")(plan_diff)
    app.command("plan-export")(plan_export)
    app.command("plan-import")(plan_import)
    app.command()(schema)


def plan(
    trace: TraceArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Plan file to write.")] = None,
    current: Annotated[
        Path | None, typer.Option(help="The plan in force: moves count, leaving it may win.")
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
    dispatch: Dispatch = "balanced",
    max_moves: Annotated[
        int | None, typer.Option(help="With --current: move at most so many experts.")
    ] = None,
    phase: Annotated[
        str, typer.Option(help="all, prefill, decode, or apart (a plan for each).")
    ] = "all",
    effort: Annotated[str, typer.Option(help="fast, normal or thorough.")] = "normal",
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds; the best plan so far when it fires.")
    ] = None,
    cluster: ClusterFile = None,
    preset: Preset = "h100",
    nodes: Nodes = 1,
    devices_per_node: DevicesPerNode = 8,
    slots_per_device: SlotsPerDevice = None,
    traffic: TrafficMode = "return_home/per_expert",
    model: ModelSource = None,
    step_tokens: StepTokens = 512,
    concurrency: Concurrency = 64,
    order: Order = "interleaved",
    num_experts: NumExperts = None,
    address: Address = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Plan placement, replicas and dispatch; say what the plan is worth before anyone moves."""
    from .errors import UsageError
    from .traces.trace import RoutingTrace

    if phase not in ("all", "prefill", "decode", "apart"):
        raise UsageError(f"unknown phase {phase!r}: all, prefill, decode or apart")
    if max_moves is not None and current is None:
        raise UsageError("--max-moves counts moves away from a plan: name it with --current")
    if max_moves is not None and method:
        raise UsageError("--max-moves starts from the plan in force: leave --method out")
    require_new(out)
    source, notes = read_routing(trace, num_experts)
    options: dict[str, Any] = {
        "cluster": build_cluster(cluster, preset, nodes, devices_per_node, slots_per_device,
                                 traffic, source.num_experts),
        "methods": method, "current": _load_plan(current), "max_moves": max_moves,
        "steps": build_sampler(step_tokens, concurrency, order, 0), "model": read_model(model),
        "dispatch": dispatch, "objective": objective, "effort": effort, "seed": seed,
        "time_limit_s": time_limit,
    }
    options["executor"] = _executor(address)
    if not isinstance(source, RoutingTrace):
        _plan_loads(source, notes, out, json, options)
        return
    parts = {"all": {"": source}, "apart": {"prefill": source, "decode": source}}.get(
        phase, {phase: source}
    )
    answers = {}
    for name, part in parts.items():
        if name and part.phase is None:
            raise UsageError(
                f"{trace} does not tell prefill from decode: plan it as a whole (--phase all), or "
                "record a trace with phases"
            )
        part = part.slice_phase(name) if name else part  # type: ignore[arg-type]
        answers[name] = _advise(part, options)
    for name, advice in answers.items():
        target = _target(out, name if phase == "apart" else "")
        if target is not None:
            require_new(target)
            advice.plan.save(target)
        if not json:
            _print_advice(advice, name, target, notes, options["cluster"].num_nodes)
    if json:
        documents = {n or "all": a.to_dict() | {"notes": list(notes)} for n, a in answers.items()}
        show.print_json(documents if phase == "apart" else next(iter(documents.values())))


def _advise(trace: Any, options: dict[str, Any]) -> Advice:
    from .placement.advise import CURRENT, advise

    chosen = {k: v for k, v in options.items() if k not in ("methods", "max_moves")}
    if options["methods"]:
        chosen["methods"] = options["methods"]
    if options["max_moves"] is not None:
        return _rebalanced(trace, options)
    with show.progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(method: str, done: int, layers: int, gap: float) -> None:
            if method not in tasks:
                tasks[method] = bar.add_task(method, total=layers)
            bar.update(tasks[method], completed=done,
                       description=f"{method}: layers planned, gap {gap:.1%}")

        advice = advise(trace, progress=progress, **chosen)
    assert advice.chosen == CURRENT or advice.chosen in advice.results
    return advice


def _rebalanced(trace: Any, options: dict[str, Any]) -> Advice:
    """With --max-moves the answer is the best plan within the budget, against the current one."""
    from .placement.advise import CURRENT, Advice, hold_back
    from .placement.comparison import compare
    from .placement.rebalance import rebalance

    planning, judging, judged_on = hold_back(trace, options["steps"], options["seed"])
    result = rebalance(options["current"], planning, **_budget_options(options))
    plans = {CURRENT: options["current"], "rebalance": result.plan}
    comparison = compare(
        plans, judging, options["cluster"], steps=options["steps"], dispatch=options["dispatch"],
        model=options["model"], current=CURRENT,
    )
    best = comparison.rows[0]
    chosen = best.name if best.change_high_percent < 0 else CURRENT
    return Advice(comparison.verdict, chosen, comparison, {"rebalance": result}, plans, judged_on)


def _budget_options(options: dict[str, Any]) -> dict[str, Any]:
    """What `rebalance` takes, without the plan it starts from."""
    names = ("cluster", "max_moves", "steps", "dispatch", "model", "objective", "effort", "seed",
             "executor", "time_limit_s")
    return {name: options[name] for name in names}


def _plan_loads(
    profile: Any, notes: tuple[str, ...], out: Path | None, json: bool, options: dict[str, Any]
) -> None:
    """A load-only dump: plans for average loads, judged on them alone."""
    from .placement.planner import plan as make_plan
    from .placement.rebalance import rebalance

    results: dict[str, PlanResult] = {}
    if options["max_moves"] is not None:
        results["rebalance"] = rebalance(options["current"], profile, **_budget_options(options))
    else:
        chosen = {k: v for k, v in options.items() if k not in ("methods", "max_moves")}
        for name in dict.fromkeys(options["methods"] or ["auto", "eplb", "greedy", "contiguous"]):
            results[name] = make_plan(profile, method=name, **chosen)
    best = min(results, key=lambda n: (results[n].evidence.objective, list(results).index(n)))
    if out is not None:
        results[best].plan.save(out)
    rows = [
        (("* " if n == best else "  ") + n, r.evidence.objective, r.evidence.bound,
         f"{r.evidence.gap:.2%}", r.seconds)
        for n, r in sorted(results.items(), key=lambda kv: kv[1].evidence.objective)
    ]
    verdict = (
        f"{best}: imbalance of the average loads {results[best].evidence.objective:.4f}; "
        "how single steps fare cannot be told from average loads"
    )
    if results[best].moves:
        verdict = f"{len(results[best].moves)} experts move; {verdict}"
    if json:
        show.print_json({
            "verdict": verdict, "chosen": best, "notes": list(notes),
            "rows": [{"name": n, "seconds": r.seconds} | r.evidence.model_dump()
                     for n, r in results.items()],
        })
        return
    show.print_verdict(verdict)
    show.print_table("", ("method", "objective", "bound", "gap", "seconds"), rows)
    show.print_notes(notes)


def _print_advice(
    advice: Advice, name: str, target: Path | None, notes: tuple[str, ...], nodes: int
) -> None:
    show.print_verdict((f"{name}: " if name else "") + advice.verdict)
    rows = []
    for row in advice.comparison.rows:
        result = advice.results.get(row.name)
        judged = advice.comparison.evaluations[row.name]
        rows.append((
            ("* " if row.name == advice.chosen else "  ") + row.name, row.metric,
            _band(row.change_percent, row.change_low_percent, row.change_high_percent),
            judged.imbalance_p99,
            judged.remote_node_copies_per_token if nodes > 1
            else judged.remote_device_copies_per_token,
            None if result is None else result.evidence.bound,
            None if result is None else f"{result.evidence.gap:.2%}",
            None if result is None else result.seconds,
            advice.plans[row.name].spare_slots,
        ))
    show.print_table(
        "* = use this", ("plan", _metric(advice.comparison), "change, %", "p99 imbalance",
                         "node copies" if nodes > 1 else "device copies", "bound", "gap",
                         "seconds", "replicas"), rows,
    )
    fired = [n for n, r in advice.results.items() if r.truncated]
    chosen = advice.results.get(advice.chosen)
    show.print_notes((
        f"judged on {advice.judged_on}",
        "bound: no plan can be better on the planning steps; gap: how far above it this one is",
        *([f"time limit fired: {', '.join(fired)} may improve with more time"] if fired else []),
        *([] if chosen is None else chosen.evidence.notes), *notes, *advice.comparison.notes,
    ))
    if target is not None:
        show.out().print(f"wrote {advice.chosen} to {target}", markup=False)


def _band(centre: float, low: float, high: float) -> str:
    return f"{centre:+.1f} ± {(high - low) / 2:.1f}"


def _metric(table: Comparison) -> str:
    return table.metric_name.replace("_us", ", us").replace("_", " ")


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
    model: ModelSource = None,
    step_tokens: StepTokens = 512,
    concurrency: Concurrency = 64,
    order: Order = "interleaved",
    num_experts: NumExperts = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Judge plans on a trace, side by side on the same steps, with confidence bands."""
    from .errors import UsageError
    from .placement.comparison import compare

    named = {path.stem: _load_plan(path) for path in plans}
    if len(named) != len(plans):
        raise UsageError("two plan files share a name: rename one, names label the rows")
    first = next(iter(named))
    reference = None
    if current is not None:
        reference = "current" if current.stem in named else current.stem
        named[reference] = _load_plan(current)
    routing, notes = read_trace(trace, num_experts)
    shape = named[first]
    assert shape is not None
    place = build_cluster(
        cluster, preset, nodes, devices_per_node or -(-shape.num_devices // max(nodes, 1)),
        shape.slots_per_device, traffic, routing.num_experts,
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
            _band(row.change_percent, row.change_low_percent, row.change_high_percent),
            judged.imbalance_mean, judged.imbalance_p99, judged.imbalance_worst,
            judged.remote_device_copies_per_token, judged.remote_node_copies_per_token,
            judged.active_experts_per_device,
        ))
    show.print_table(
        "", ("plan", _metric(table), "95 %", f"% vs {table.reference}", "imbalance", "p99",
             "worst", "device copies", "node copies", "active"), rows,
    )
    show.print_notes((
        f"{table.steps} steps, worth {table.independent_steps:.0f} independent ones; "
        f"{table.method}, {table.resamples} resamples", *notes, *table.notes,
    ))


def plan_show(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file.")],
    json: Json = False,
) -> None:
    """What a plan says: slots, replicas, dispatch, where it came from and how good it is."""
    from .placement.describe import describe_plan

    told = describe_plan(_load_plan(plan_file))
    if json:
        show.print_json(told.to_dict())
        return
    show.print_verdict(told.summary)
    show.print_table("", ("plan", ""), told.facts)
    show.print_table("", told.layer_columns, told.layer_rows)
    show.print_notes(told.notes)


def plan_diff(
    old: Annotated[Path, typer.Argument(help="Plan file.")],
    new: Annotated[Path, typer.Argument(help="Plan file.")],
    model: ModelSource = None,
    json: Json = False,
) -> None:
    """What changes from one plan to another: experts to move, by layer and device, and bytes."""
    from .placement.difference import diff_plans

    before, after = _load_plan(old), _load_plan(new)
    told = diff_plans(before, after, read_model(model))
    if json:
        show.print_json(told.to_dict())
        return
    show.print_verdict(told.summary)
    if told.rows:
        show.print_table("", told.columns, told.rows)
    if told.device_rows:
        show.print_table("", told.device_columns, told.device_rows)
    show.print_notes(told.notes)


def plan_export(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file.")],
    format: Annotated[
        str, typer.Option("--format", help="sglang, trtllm, vllm_ascend, eplb or omni.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Write the nearest plan the engine can hold.")
    ] = False,
    model: ModelSource = None,
    json: Json = False,
) -> None:
    """Write a plan as an engine's own file; refuses what that engine cannot hold."""
    from .placement.formats import export_plan

    require_new(out)
    notes = export_plan(
        _load_plan(plan_file), format, out, model=read_model(model), nearest=nearest
    )
    if json:
        show.print_json({"file": str(out), "format": format, "notes": notes})
        return
    show.print_verdict(f"wrote {out} for {format}")
    show.print_notes(notes)


def plan_import(
    source: Annotated[Path, typer.Argument(help="An engine's plan file.")],
    format: Annotated[
        str, typer.Option("--format", help="sglang, trtllm, vllm_ascend, eplb or omni.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan file to write.")],
    devices: Annotated[
        int | None, typer.Option(help="Devices, where the file does not say.")
    ] = None,
    num_experts: NumExperts = None,
    model: ModelSource = None,
    json: Json = False,
) -> None:
    """Read an engine's plan, check every line of it, and write it as a plan file."""
    from .placement.describe import shape_text
    from .placement.formats import import_plan

    require_new(out)
    found = import_plan(
        source, format, num_devices=devices, num_experts=num_experts, model=read_model(model)
    )
    found.plan.save(out)
    shape = shape_text(found.plan)
    if json:
        show.print_json({"file": str(out), "format": format, "plan": shape, "notes": found.notes})
        return
    show.print_verdict(f"imported {source} ({format}) to {out}: {shape}")
    show.print_notes(found.notes)


def schema(
    name: Annotated[
        str | None, typer.Argument(help="plan, cluster, model, trace or hardware.")
    ] = None,
) -> None:
    """JSON Schema of every file format, or of one."""
    from .errors import UsageError
    from .placement.cluster import Cluster
    from .placement.hardware import HardwareProfile
    from .placement.plan import plan_schema
    from .traces.manifest import Manifest
    from .traces.spec import ModelSpec

    schemas = {
        "plan": plan_schema, "cluster": Cluster.model_json_schema,
        "model": ModelSpec.model_json_schema, "trace": Manifest.model_json_schema,
        "hardware": HardwareProfile.model_json_schema,
    }
    if name is not None and name not in schemas:
        raise UsageError(f"no format {name!r}; there are: {', '.join(schemas)}")
    show.print_json(schemas[name]() if name else {n: make() for n, make in schemas.items()})


def _load_plan(path: Path | None) -> Any:
    from .placement.plan import Plan

    return None if path is None else Plan.load(path)


def _target(out: Path | None, name: str) -> Path | None:
    return out if out is None or not name else out.with_suffix(f".{name}{out.suffix or '.json'}")


def _executor(address: str | None) -> Any:
    """Ray tasks on the cluster named, or None: in this process."""
    if address is None:
        return None
    from .workers.jobs import RayExecutor

    return RayExecutor(address)
