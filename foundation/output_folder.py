"""The run folder: where a verb leaves what it found. Knows names and files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..errors import LoadmasterError, UsageError


def new_run_folder(out: Path | None, kind: str) -> Path:
    """Make `out`, or the next free loadmaster-runs/KIND-N.

    Raises UsageError where `out` exists, LoadmasterError where it cannot be made.
    """
    if out is None:
        base = Path("loadmaster-runs")
        tails = (p.name[len(kind) + 1 :] for p in base.glob(f"{kind}-*"))
        out = base / f"{kind}-{1 + max((int(t) for t in tails if t.isdigit()), default=0)}"
    if out.exists():
        raise UsageError(f"{out} exists: name another run folder with --out")
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise LoadmasterError(f"{out}: cannot be created: {error.strerror}") from error
    return out


def remove_if_empty(folder: Path) -> None:
    """A run that ended before it had anything to leave leaves no folder."""
    with suppress(OSError):
        folder.rmdir()
