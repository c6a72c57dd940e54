"""`demo`, `run`, `apply`, `submit`: live workers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import cli_output as show
from .cli_options import Address, Json, Seed

if TYPE_CHECKING:
    from .placement.comparison import Comparison
    from .workers.group import Group


def register(app: typer.Typer) -> None:
    """Put the verbs of this file on the root command."""
    app.command()(demo)
    app.command()(run)
    app.command()(apply)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)


def demo(
    ranks: Annotated[int, typer.Option(help="Worker processes.")] = 4,
    out: Annotated[
        Path | None, typer.Option(help="Run folder [default: the next loadmaster-runs/demo-N].")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """The whole loop on this machine: serve, record, plan, simulate, apply, measure."""
    from .cli_demo import print_demo
    from .workers.demo import run_demo

    with show.progress_bar() as bar:
        task = bar.add_task("starting", total=None)
        result = run_demo(
            ranks=ranks, out=out, seed=seed,
            progress=lambda said, done, total: bar.update(
                task, description=said, completed=done, total=total
            ),
        )
    if json:
        show.print_json(result.to_dict())
    else:
        print_demo(result)


def run(
    model: Annotated[Path, typer.Option(help="Checkpoint folder of any Hugging Face MoE model.")],
    ranks: Annotated[int, typer.Option(help="Worker processes, one per GPU or CPU share.")],
    plan: Annotated[
        Path | None, typer.Option(help="Plan to serve under [default: experts in order].")
    ] = None,
    decode_plan: Annotated[Path | None, typer.Option(help="A plan of its own for decode.")] = None,
    name: Annotated[str, typer.Option(help="What `apply` finds the group by.")] = "default",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float64.")] = "bfloat16",
    traffic: Annotated[
        str, typer.Option(help="return_home/per_expert or return_home/per_rank.")
    ] = "return_home/per_expert",
    record_to: Annotated[
        Path | None, typer.Option(help="Record routing to this new trace folder.")
    ] = None,
    gpus_per_rank: Annotated[float, typer.Option(help="GPUs of each rank.")] = 0.0,
    address: Address = None,
) -> None:
    """Start a named group of live ranks; serves until Ctrl-C."""
    import signal

    from .placement.plan import Plan
    from .workers.group import Group

    group = Group.start(
        model, None if plan is None else Plan.load(plan), ranks=ranks, name=name, dtype=dtype,
        decode_plan=None if decode_plan is None else Plan.load(decode_plan),
        traffic=traffic, record_to=record_to, address=address, gpus_per_rank=gpus_per_rank,
    )
    for ended_by in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ended_by, signal.default_int_handler)
    try:
        if record_to is not None:
            group.record(True)
        spec = group.model_spec
        show.print_verdict(
            f"group {name!r} serves {spec.name}: {spec.num_layers} MoE layers x "
            f"{spec.num_experts} experts on {ranks} ranks; Ctrl-C or SIGTERM ends it"
        )
        show.err().print(
            f"from another shell: loadmaster apply PLAN --name {name}; "
            f"from Python: loadmaster.Group.find({name!r})"
        )
        signal.pause()
    finally:
        group.stop()


def apply(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    name: Annotated[str, typer.Option(help="The running group.")] = "default",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would move and what it is worth; move none.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Judge on this trace [default: what the group recorded].")
    ] = None,
    address: Address = None,
    json: Json = False,
) -> None:
    """Move a running group to a plan: stage, verify, commit, without stopping it."""
    from .placement.plan import Plan
    from .workers.group import Group

    target = Plan.load(plan)
    group = Group.find(name, address)
    standing, epoch = group.plan, group.epoch
    moves = standing.moves_to(target)
    each = int(group.model_spec.bytes_per_expert_E()[0])
    if dry_run:
        table = _judge(group, standing, target, trace)
        verdict = "no recorded traffic to judge on" if table is None else table.verdict
        told = {"verdict": verdict, "epoch": epoch, "moves": len(moves),
                "move_bytes": len(moves) * each, "applied": False}
        said = f"{verdict}; {len(moves)} experts would move, {show.size(len(moves) * each)}"
    else:
        report = group.apply(target, epoch=epoch)
        told = {"epoch": report.epoch, "moves": len(report.moved),
                "move_bytes": report.moved_bytes, "retried_bytes": report.retried_bytes,
                "stage_steps": report.stage_steps, "commit_us": report.commit_us, "applied": True}
        said = (
            f"group {name!r} serves under {plan.name}: epoch {report.epoch}, "
            f"{len(report.moved)} experts moved, {show.size(report.moved_bytes)}"
        )
    if json:
        show.print_json(told)
    else:
        show.print_verdict(said)


def _judge(group: Group, standing: object, target: object, trace: Path | None) -> Comparison | None:
    """Both plans on recorded traffic; None where there is none."""
    from .cli_options import read_trace
    from .errors import LoadmasterError
    from .placement.cluster import Cluster
    from .placement.comparison import compare
    from .placement.plan import Plan
    from .traces.steps import StepSampler

    assert isinstance(standing, Plan) and isinstance(target, Plan)
    if trace is not None:
        routing, _ = read_trace(trace)
    else:
        try:
            routing = group.trace()
        except LoadmasterError:
            return None
    cluster = Cluster.preset(
        "cpu", devices_per_node=standing.num_devices, slots_per_device=standing.slots_per_device
    )
    steps = StepSampler() if routing.step is None else StepSampler(order="recorded")
    return compare({"now": standing, "new": target}, routing, cluster, steps=steps, current="now")


def submit(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="The cluster's dashboard, http://HOST:PORT.")],
    send: Annotated[
        list[Path] | None, typer.Option(help="A file or folder among the arguments; may repeat.")
    ] = None,
    fetch: Annotated[
        list[Path] | None, typer.Option(help="A result file among the arguments; may repeat.")
    ] = None,
) -> None:
    """Run another verb on a Ray cluster: `loadmaster submit --address A --send t -- plan t ...`."""
    from .errors import UsageError
    from .workers.submit import submit as send_job

    if not context.args:
        raise UsageError("name the verb to run after `--`, as in: submit --address A -- plan TRACE")
    for path in fetch or ():
        if path.exists():
            raise UsageError(f"{path} exists: name another file, or remove it first")
    result = send_job(address, context.args, inputs=send or (), outputs=fetch or ())
    for path in result.fetched:
        show.err().print(f"fetched {path}", markup=False)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
