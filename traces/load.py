"""A trace from wherever it lies: a stored trace, an array file, an engine's dump.

Knows which reader a path needs; knows `storage/` and `formats/`, which do not know it.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .storage.manifest import (
    MANIFEST_NAME,
)
from .storage.store import open_trace
from .trace import RoutingTrace


def load_trace(path: Path | str, *, verify: bool = True) -> RoutingTrace:
    """The whole trace at `path`: a stored trace, or an array file or engine dump (formats/).

    Raises InputError where the file holds loads only, which are a Profile and not a trace.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists():
        return open_trace(path, verify=verify).read()
    from .formats import import_any

    result = import_any(path)
    if result.trace is None:
        raise InputError(
            f"{path}: holds loads per expert, not routing per token",
            call="plan from the profile that `import_any` finds in it",
            command="`loadmaster plan` takes it directly, and plans for load only",
        )
    return result.trace
