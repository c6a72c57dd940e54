"""Errors a user may see. Each message says what is wrong, where, and what to do.

What to do depends on who asks: a function's caller passes an argument, whoever typed a verb types
another. An error may carry both, `call` and `command`; its text ends with the caller's, and
`typed` with the other. Knows nothing of any floor; every floor may raise these. `cli/main.py` turns
them into one line on stderr and the exit code below, so a user's mistake never ends in a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self


class LoadmasterError(Exception):
    """Something failed that the user can act on. call, command: what helps in Python, and typed."""

    exit_code = 1

    def __init__(self, text: str = "", *, call: str = "", command: str = "") -> None:
        super().__init__(text)
        self.call, self.command = call, command

    @property
    def what(self) -> str:
        """What is wrong and where, without what to do."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return _with(self.what, self.call or self.command)

    @property
    def typed(self) -> str:
        """The text for the command line."""
        return _with(self.what, self.command or self.call)

    def under(self, place: object) -> Self:
        """The same error, beginning with a place: a file, a field."""
        return type(self)(f"{place}: {self.what}", call=self.call, command=self.command)


def _with(what: str, advice: str) -> str:
    return f"{what}: {advice}" if advice else what



class InputError(LoadmasterError, ValueError):
    """A file, an array or a checkpoint does not hold what it must."""


class UsageError(LoadmasterError, ValueError):
    """An option or argument that cannot mean anything here."""

    exit_code = 2


class InfeasibleError(LoadmasterError):
    """No plan can satisfy what was asked: too few slots, too little memory, no survivors."""

    exit_code = 3


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An InputError from inside that does not say where it is from begins with this path."""
    try:
        yield
    except InputError as error:
        if error.what.startswith(tuple(f"{path}{mark}" for mark in ":/,")):
            raise
        raise error.under(path) from error
