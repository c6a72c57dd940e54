"""`demo`, `run`, `apply`, `submit`: live workers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import cli_output as show
from .cli_options import Json, Seed


def register(app: typer.Typer) -> None:
    """Put the verbs of this file on the root command."""
    app.command()(demo)


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
