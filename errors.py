"""Errors a user may see. Each message says what is wrong, where, and what to do.

Knows nothing of any floor; every floor may raise these. `cli.py` turns them into one line on
stderr and the exit code below, so a user's mistake never ends in a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LoadmasterError(Exception):
    """Something failed that the user can act on."""

    exit_code = 1


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
        if str(error).startswith(tuple(f"{path}{mark}" for mark in ":/,")):
            raise
        raise type(error)(f"{path}: {error}") from error
