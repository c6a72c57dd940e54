"""Errors a user may see. Each message says what is wrong, where, and what to do.

Written are options, as whoever typed a verb types them: `--num-experts`; `typed` is that text. A
function's caller reads parameters instead: `str` says num_experts, and leaves alone what stands in
backticks, which is a whole command. Where what helps one does not help the other, an error carries
both, `call` and `command`. Knows nothing of any floor; every floor may raise these. `cli/main.py`
turns them into one line on stderr and the exit code below, so a user's mistake never ends in a
traceback.
"""

from __future__ import annotations

import re
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
        return _with(as_parameters(self.what), self.call or as_parameters(self.command))

    @property
    def typed(self) -> str:
        """The text for the command line."""
        return _with(self.what, self.command or self.call)

    def under(self, place: object) -> Self:
        """The same error, beginning with a place: a file, a field."""
        return type(self)(f"{place}: {self.what}", call=self.call, command=self.command)


# Options whose parameter has another name, in the functions that they go to.
_PARAMETERS = {"key": "keys", "devices": "num_devices", "arrivals-unit": "unit",
               "rate": "rate_per_s"}
_OPTION = re.compile(
    r"(?:^|(?<=[\s(]))--([a-z][a-z0-9-]*[a-z0-9])(?: ([A-Z]{2,3}|\d+(?:[,-]\d+)*)(?![\w-]))?"
)


def as_parameters(text: str) -> str:
    """The command line's options as the parameters they are in Python, `--top-k 4` as top_k=4;
    what stands in backticks is a command and stays."""
    def parameter(found: re.Match[str]) -> str:
        option, value = found[1], found[2]
        name = _PARAMETERS.get(option, option.replace("-", "_"))
        if value is None:
            return name
        return f"{name}={value if value.isdecimal() else repr(value)}"

    parts = text.split("`")
    parts[::2] = [_OPTION.sub(parameter, part) for part in parts[::2]]
    return "`".join(parts)


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
