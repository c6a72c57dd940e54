"""Plans in the engines' own files: one module per engine, both ways."""

from __future__ import annotations

from pathlib import Path

from ...errors import UsageError
from ...traces.spec import ModelSpec
from ..plan import Plan
from . import omni
from .imported import ImportedPlan

__all__ = ["FORMATS", "ImportedPlan", "export_plan", "import_plan"]

_MODULES = {"omni": omni}
FORMATS = tuple(_MODULES)


def export_plan(
    plan: Plan, format: str, path: Path | str, *, model: ModelSpec | None = None
) -> tuple[str, ...]:
    """Write `plan` as the engine's file; returns notes."""
    if format not in _MODULES:
        raise UsageError(f"unknown format {format!r}: {', '.join(FORMATS)}")
    _MODULES[format].write(plan, Path(path))
    return ()


def import_plan(
    path: Path | str, format: str, *, num_devices: int | None = None,
    num_experts: int | None = None, model: ModelSpec | None = None,
) -> ImportedPlan:
    """Read an engine's plan file."""
    if format not in _MODULES:
        raise UsageError(f"unknown format {format!r}: {', '.join(FORMATS)}")
    return ImportedPlan(_MODULES[format].read(Path(path)))
