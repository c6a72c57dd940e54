"""What a coordinator needs of the ranks it leads, however they run.

`launch.RayFleet` runs them as Ray actors; tests run them as threads of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import LoadmasterError
from .settings import RankSettings


class RankLostError(LoadmasterError):
    """Ranks died, hang or fell out of the group; `ranks` says which, as far as known."""

    def __init__(self, ranks: Sequence[int], reason: str) -> None:
        super().__init__(reason)
        self.ranks = tuple(ranks)

    def __reduce__(self) -> Any:
        return RankLostError, (self.ranks, str(self))


class Fleet(Protocol):
    """Ranks that can be started, called and ended."""

    @property
    def ranks(self) -> int: ...

    @property
    def pids(self) -> list[int]: ...

    def start(self, settings: Sequence[RankSettings], timeout_s: float) -> None:
        """Start one rank per setting; returns when all answer."""

    def hosts(self) -> list[str]:
        """Each rank's address for the exchange."""

    def call(self, rank: int, method: str, *args: Any, **options: Any) -> Any:
        """Start a method of one rank."""

    def call_all(self, method: str, *args: Any) -> list[Any]:
        """Start a method of every rank."""

    def gather(self, answers: list[Any], timeout_s: float) -> list[Any]:
        """All answers; the first failure is raised at once."""

    def end(self) -> None:
        """End all ranks."""
