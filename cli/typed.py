"""Parameters, as whoever typed a verb knows them.

A UsageError names what a function was given: `switch_tokens -5`. On the command line that is the
option `--switch-tokens`. Knows the verb's options and the few whose names differ from what the
functions call them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# what functions call it -> what the option's own parameter is called
_CALLED = {
    "tokens": "step_tokens", "time_limit_s": "time_limit", "rate_per_s": "rate",
    "num_devices": "devices", "horizon_steps": "horizon",
}
_GIVEN = r"(?= (?:[-'\d\"]|nan\b|inf\b))"       # a word that names, not one that speaks


def as_typed(text: str, command: Any, arguments: Sequence[str]) -> str:
    """The text with the verb's parameters written as its options, where a value follows them or
    an underscore shows that they are names.

    command: the root one; arguments: what was typed after it.
    """
    for word in arguments:
        if hasattr(command, "commands") and word in command.commands:
            command = command.commands[word]
    options = {one.name: one.opts[0] for one in getattr(command, "params", ())
               if one.opts[0].startswith("--")}
    for name, own in _CALLED.items():
        if own in options:
            options.setdefault(name, options[own])
    for name, option in sorted(options.items(), key=lambda pair: -len(pair[0])):
        given = "" if "_" in name else _GIVEN
        text = re.sub(rf"(?<![\w-]){name}\b{given}", option, text)
    return text
