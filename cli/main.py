"""The command line: verbs, printing, wiring. No logic, and no heavy import outside a verb.

`main` turns every error a user can make into one line on stderr and the exit code of its kind:
0 done (also "leave it"), 1 failed, 2 usage, 3 no feasible plan; `evaluate` alone: 4 when the first
plan is worse than the one named by --current.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import LoadmasterError
from ..foundation.version import VERSION
from . import (
    apply,
    cache,
    calibrate,
    evaluate,
    live,
    plan,
    plan_files,
    replay,
    run,
    simulate,
    trace,
    whatif,
)
from .output import ReaderGoneError


class _Verbs(TyperGroup):
    """Typer ends an interrupted or cut-off verb without a word and with a code of its own."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("loadmaster: interrupted; nothing half-written is left in place",
                  file=sys.stderr)
            raise typer.Exit(130) from None
        except ReaderGoneError:      # no failure; any other broken pipe is one
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = typer.Typer(
    name="loadmaster",
    cls=_Verbs,
    help="Decides which GPU every expert of a mixture-of-experts model lives on: records routing, "
    "plans, proves the plan in simulation, applies it to live workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(trace.app, name="trace")
for verb in (
    plan.plan, evaluate.evaluate, plan_files.plan_show, plan_files.plan_diff,
    plan_files.plan_export, plan_files.plan_import, plan_files.schema,
    simulate.simulate, replay.replay, whatif.whatif, cache.cache, calibrate.calibrate,
    live.demo, run.run, apply.apply,
):
    app.command()(verb)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    live.submit
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loadmaster {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and leave.")
    ] = False,
) -> None:
    """Root options."""


def main() -> None:
    """Run a verb; errors become one line and an exit code."""
    try:
        app()
    except LoadmasterError as error:
        print(f"loadmaster: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("loadmaster: interrupted; nothing half-written is left in place", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a name too long, a disk gone: what no verb foresaw
        place = f"{str(error.filename)[:200]}: " if error.filename else ""
        print(f"loadmaster: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except MemoryError:
        print("loadmaster: out of memory: use fewer tokens or a larger machine",
              file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
