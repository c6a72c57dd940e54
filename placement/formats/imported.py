"""What an importer hands back."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Plan


@dataclass(frozen=True)
class ImportedPlan:
    """An engine's plan as ours, and what its file could not tell."""

    plan: Plan
    notes: tuple[str, ...] = ()
