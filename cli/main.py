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

from ..errors import LoadmasterError, UsageError
from ..foundation.version import VERSION
from . import (
    apply,
    cache,
    calibrate,
    evaluate,
    example,
    live,
    plan,
    plan_files,
    replay,
    run,
    simulate,
    trace,
    whatif,
)
from .endings import interrupted_on_endings
from .output import ReaderGoneError, print_error
from .spelling import spell_streams
from .typed import as_typed

INTERRUPTED = "interrupted; nothing half-written is left in place"


class _Verbs(TyperGroup):
    """Typer ends an interrupted or cut-off verb without a word and with a code of its own."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_error(INTERRUPTED)
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
    plan_files.plan_export, plan_files.plan_import, plan_files.schema, example.example,
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
    spell_streams()
    try:
        with interrupted_on_endings():
            app()
    except KeyboardInterrupt:
        print_error(INTERRUPTED)
        sys.exit(130)
    except Exception as error:
        found = _ours(error)
        if found is None:
            raise
        print_error(_told(found))
        sys.exit(found.exit_code)


def _told(error: LoadmasterError) -> str:
    """The error in the words of whoever typed the verb; one about a file keeps the file's own."""
    if not isinstance(error, UsageError):
        return error.typed
    return as_typed(error.typed, typer.main.get_command(app), sys.argv[1:])


def _ours(error: Exception) -> LoadmasterError | None:
    """The error as one of ours; None for one that only a mistake in this code can raise."""
    if isinstance(error, LoadmasterError):
        return error
    if isinstance(error, OSError):      # a name too long, a disk gone: what no verb foresaw
        place = f"{str(error.filename)[:200]}: " if error.filename else ""
        return LoadmasterError(f"{place}{error.strerror or error}")
    if isinstance(error, MemoryError):
        return LoadmasterError("out of memory: use fewer tokens or a larger machine")
    if type(error).__module__.startswith("ray."):
        from ..workers.fleet.crossing import crossed

        return crossed(error)
    return None


if __name__ == "__main__":
    main()
