"""Progress where stderr is no terminal: a plain line now and then.

Knows strings and a clock. Answers to the part of rich's Progress that the verbs use.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

EVERY_S = 10.0


@dataclass
class _Task:
    description: str
    total: float | None
    completed: float = 0.0

    def __str__(self) -> str:
        return self.description + (
            f" {self.completed:,.0f}/{self.total:,.0f}" if self.total else ""
        )


class PlainProgress:
    """Says what is being done when it changes, and how far it is at most every `every_s`."""

    def __init__(self, every_s: float = EVERY_S, file: IO[str] | None = None) -> None:
        self._every_s, self._file = every_s, file
        self._tasks: list[_Task] = []
        self._told = self._began = time.monotonic()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def add_task(self, description: str, total: float | None = None) -> Any:
        """Begin something; its number."""
        self._tasks.append(_Task(description, total))
        self._say(self._tasks[-1])
        return len(self._tasks) - 1

    def update(
        self, task: Any, *, description: str | None = None, completed: float | None = None,
        total: float | None = None,
    ) -> None:
        """How far it is; None leaves one as it is."""
        one = self._tasks[int(task)]
        changed = description is not None and description != one.description
        one.description = one.description if description is None else description
        one.completed = one.completed if completed is None else completed
        one.total = one.total if total is None else total
        if changed or time.monotonic() - self._told >= self._every_s:
            self._say(one)

    def advance(self, task: Any, advance: float = 1.0) -> None:
        """One further."""
        self.update(task, completed=self._tasks[int(task)].completed + advance)

    def _say(self, task: _Task) -> None:
        self._told = time.monotonic()
        passed = self._told - self._began
        with suppress(OSError):      # nobody looks on; the work goes on
            print(f"{task} ({passed:.0f} s)", file=self._file or sys.stderr, flush=True)
