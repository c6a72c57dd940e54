"""`example`: a file of one kind that works, to change and use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output as show


def example(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="grid, faults, cluster or model.")],
    path: Annotated[
        Path | None, typer.Argument(help="File to write [default: print it].")
    ] = None,
) -> None:
    """A grid, a fault file, a cluster or a model that works, to change and use."""
    from ..app.examples import example as text_of
    from ..app.examples import usage
    from ..app.inputs import require_target, writing
    from ..foundation.atomic_file import replacing

    text = text_of(kind)
    if path is None:
        show.print_raw(text)
        return
    require_target(path)
    with writing(path), replacing(path) as file:
        file.write(text.encode())
    show.print_verdict(f"wrote {path}: {usage(kind, path)}")
