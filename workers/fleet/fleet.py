"""What a coordinator needs of the ranks it leads, however they run.

`launch.RayFleet` runs them as Ray actors; `thread_fleet.ThreadFleet` as threads of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ...errors import LoadmasterError
from ..protocol.settings import RankSettings


class RankLostError(LoadmasterError):
    """Ranks died, hang or fell out of the group; `ranks` says which, as far as known."""

    def __init__(self, ranks: Sequence[int], reason: str) -> None:
        super().__init__(reason)
        self.ranks = tuple(ranks)

    def __reduce__(self) -> Any:
        return RankLostError, (self.ranks, str(self))


class OverdueError(LoadmasterError):
    """An answer did not come in time; nobody is known to be lost."""


class Fleet(Protocol):
    """Ranks that can be started, called, watched, replaced and ended."""

    @property
    def ranks(self) -> int: ...

    @property
    def pids(self) -> list[int]:
        """Process ids in rank order."""

    def start(self, settings: Sequence[RankSettings], timeout_s: float) -> None:
        """Start one rank per setting, numbered from 0; returns when all answer."""

    def attach(self, timeout_s: float) -> list[Any]:
        """Take over the ranks that a coordinator before this one left; their `RankState`s."""

    def hosts(self) -> list[str]:
        """Each rank's address for the exchange."""

    def call(self, rank: int, method: str, *args: Any, **options: Any) -> Any:
        """Start a method of one rank."""

    def gather(self, answers: list[Any], timeout_s: float) -> list[Any]:
        """All answers; the first failure is raised at once.

        RankLostError where a process died, OverdueError when time is up; an error raised inside a
        rank's method comes out as it went in.
        """

    def failures(self, answers: list[Any], timeout_s: float) -> list[Exception]:
        """Wait until these calls have ended, well or not, or until time is up; what they raised."""

    def silent(self, timeout_s: float) -> dict[int, str]:
        """Ranks that give no sign of life within the time, and why."""

    def kill(self, rank: int) -> None:
        """End one rank's process for certain."""

    def replace(self, settings: RankSettings, timeout_s: float) -> None:
        """Start a new process for a rank that was killed. RankLostError when none comes up."""

    def add(self, settings: RankSettings, timeout_s: float) -> None:
        """Start one rank more. RankLostError when none comes up."""

    def keep(self, ranks: Sequence[int]) -> None:
        """Go on with these ranks only, numbered anew in this order; the others are ended."""

    def end(self) -> None:
        """End all ranks."""
