"""A trace from wherever it lies: a stored trace, an array file, an engine's dump.

Knows which reader a path needs; knows `storage/` and `formats/`, which do not know it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from .storage.manifest import (
    MANIFEST_NAME,
)
from .storage.store import open_trace
from .trace import RoutingTrace


def load_trace(path: Path | str, *, verify: bool = True, **said: Any) -> RoutingTrace:
    """The whole trace at `path`: a stored trace, or another tool's file (formats/).

    said: what such a file does not say itself, as `import_any` takes it (num_experts, model, …).
    Raises InputError where the file holds loads only, which are a Profile and not a trace.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists():
        return open_trace(path, verify=verify).read()
    from .formats import import_any

    result = import_any(path, **said)
    if result.trace is None:
        raise InputError(
            f"{path}: holds loads per expert, not routing per token",
            call="plan from the profile that `import_any` finds in it",
            command="`loadmaster plan` takes it directly, and plans for load only",
        )
    return result.trace
