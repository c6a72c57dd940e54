"""What a user can name, printed as JSON: run with PYTHONPATH naming a checkout's parent folder.

`python house_surface.py MODULE` where MODULE holds typer's `app`. Verbs and options as click sees
them; public names of the package with their parameters, and the public attributes of its classes.
Texts (help, docstrings) are no part of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from typing import Any

import loadmaster


def verbs(command: Any, name: str = "loadmaster") -> dict[str, dict[str, str]]:
    """Verb -> option or argument -> what it takes; groups are walked."""
    found = {name: {_spelled(p): _takes(p) for p in command.params if p.name != "help"}}
    for word, inner in getattr(command, "commands", {}).items():
        found |= verbs(inner, f"{name} {word}")
    return found


def _spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"argument {(parameter.metavar or parameter.name).upper()}"
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _takes(parameter: Any) -> str:
    takes = parameter.type_descriptor.annotation
    words = [
        getattr(takes, "__name__", "") if not getattr(takes, "__args__", ()) else str(takes),
        "required" if parameter.required else f"default {parameter.default!r}",
        "may repeat" if parameter.multiple or parameter.nargs == -1 else "",
    ]
    return ", ".join(word for word in words if word)


def names() -> dict[str, Any]:
    """Public name -> parameters, or for a class its constructor's and its public attributes."""
    found: dict[str, Any] = {}
    for name in loadmaster.__all__:
        value = getattr(loadmaster, name)
        if not inspect.isclass(value):
            found[name] = {"parameters": _parameters(value)}
            continue
        public = [n for n in dir(value) if not n.startswith("_") and not _inherited(value, n)]
        fields = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(
            value) else list(getattr(value, "model_fields", ()))
        found[name] = {"parameters": _parameters(value)} | {
            n: _parameters(getattr(value, n)) if callable(getattr(value, n, None)) else []
            for n in sorted({*public, *fields})
        }
    return found


def _inherited(owner: type, name: str) -> bool:
    """Whether a library's base class brings it."""
    for base in owner.__mro__:
        if name in vars(base):
            return not base.__module__.startswith("loadmaster")
    return False


def _parameters(value: Any) -> list[str]:
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name if p.default is p.empty else f"{p.name}={_constant(p.default)}" for p in parameters
    ]


def _constant(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str | None) else "..."


def main() -> None:
    """Print both."""
    import typer.main

    app = importlib.import_module(sys.argv[1]).app
    print(json.dumps({"verbs": verbs(typer.main.get_command(app)), "names": names()}))


if __name__ == "__main__":
    main()
