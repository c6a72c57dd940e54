"""What an importer of a stream hands back: routes that still lie on disk."""

from __future__ import annotations

from dataclasses import dataclass

from ..result import ImportResult
from .routes import CleanRoutes


@dataclass(frozen=True)
class RoutesResult:
    """Routing that lies on disk, cleaned, and not yet in memory."""

    format: str
    routes: CleanRoutes
    cannot_tell: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def whole(self) -> ImportResult:
        """All of it, in memory."""
        return ImportResult(
            self.format, trace=self.routes.whole(), cannot_tell=self.cannot_tell,
            notes=(*self.notes, *self.routes.notes),
        )
