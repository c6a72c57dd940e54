"""`demo` and `submit`: the loop on this machine, and other verbs on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output as show
from .options import Json, Seed


def demo(
    ranks: Annotated[int, typer.Option(help="Worker processes.")] = 4,
    out: Annotated[
        Path | None, typer.Option(help="Run folder [default: the next loadmaster-runs/demo-N].")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """The whole loop on this machine: serve, record, plan, simulate, apply, measure."""
    from ..workers.demo.run import run_demo
    from .demo import print_demo

    with show.progress_bar() as bar:
        task = bar.add_task("starting", total=None)
        result = run_demo(
            ranks=ranks, out=out, seed=seed,
            progress=lambda text, done, total: bar.update(
                task, description=text, completed=done, total=total
            ),
        )
    if json:
        show.print_json(result.to_dict())
    else:
        print_demo(result)


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
    from ..errors import UsageError
    from ..workers.jobs.submit import submit as send_job

    if not context.args:
        raise UsageError("name the verb to run after `--`, as in: submit --address A -- plan TRACE")
    for path in fetch or ():
        if path.exists():
            raise UsageError(f"{path} exists: name another file, or remove it first")
    result = send_job(address, context.args, inputs=send or (), outputs=fetch or ())
    for path in result.fetched:
        show.print_line(f"fetched {path}")
    if result.exit_code:
        raise typer.Exit(result.exit_code)
