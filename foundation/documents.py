"""One YAML or JSON document read strictly, each fault one line that names the file.

The one door for what people and other programs write: clusters, grids, faults, models, plans of
ours and of the engines, manifests, journals. Refused everywhere: text that is not UTF-8, a key
given twice, nesting deeper than MOST_NESTED; in JSON also NaN and infinity, which it does not have.
YAML is read as plain values and never builds anything else. Knows files and text. Knows nothing of
what the fields mean.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import InputError

MOST_NESTED = 64             # far beyond any document of ours
MOST_REPEATED = 1_000_000    # values that aliases repeat: a short YAML file may mean a huge one
_LONGEST_FIELD, _LONGEST_FAULT = 60, 300
_HOLDERS = (dict, list, tuple, set)


def read_json(path: Path, what: str = "", *, finite: bool = True) -> Any:
    """The JSON file's value. what: "plan", for the message where there is no file.

    finite False: NaN and infinity are let in, for files of programs that write them. Raises
    InputError naming the file.
    """
    return parse_json(read_text(path, what), str(path), finite=finite)


def read_yaml(path: Path, what: str = "") -> Any:
    """The YAML file's value, JSON being YAML too. Raises InputError naming the file."""
    return parse_yaml(read_text(path, what), str(path))


def read_mapping(path: Path, what: str, fields: str) -> dict[str, Any]:
    """The YAML file's mapping. what: "grid"; fields: what it must hold, for the message.

    Raises InputError naming the file.
    """
    return require_mapping(read_yaml(path, what), str(path), f"a {what} file", fields)


def require_mapping(value: Any, where: str, what: str, fields: str) -> dict[str, Any]:
    """The value, which must be a mapping. Raises InputError: `what` is a mapping with `fields`."""
    if isinstance(value, dict):
        return value
    found = "empty" if value is None else f"a {type(value).__name__}"
    raise InputError(f"{where}: {what} is a mapping with {fields}; this is {found}")


def read_text(path: Path, what: str = "") -> str:
    """The file's text. Raises InputError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        named = f"{what} file" if what else "file"
        raise InputError(f"{path}: no such {named}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: cannot be read: a folder, not a file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: cannot be read as text: byte {error.start} is not UTF-8"
        ) from error


def parse_json(text: str, where: str, *, finite: bool = True) -> Any:
    """The value of a JSON text. finite: see `read_json`. Raises InputError beginning with
    `where`.
    """
    constant = _refuse_constant if finite else float
    try:
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
        if not text.strip():
            raise ValueError("it is empty")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant)
        _require_bounded(value)
    except RecursionError:
        raise InputError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {_said(error)}") from error
    return value


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; None where it is empty. Raises InputError naming `where`."""
    try:
        value = yaml.load(text, _Loader)
        _require_bounded(value)
    except RecursionError:
        raise InputError(f"{where}: not YAML that can be read: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{where}: not YAML: {_marked(error)}") from error
    # PyYAML lets out what Python says of a number, date or tag that is none.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{where}: not YAML: {_said(error)}") from error
    return value


def first_fault(error: ValidationError, known: str = "") -> str:
    """The first thing pydantic found, in one line: field and reason.

    known: the fields there are, named where one at the top is unknown.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(_cut(str(part), _LONGEST_FIELD) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        there = f"; there are: {known}" if known and len(first["loc"]) == 1 else ""
        return _one_line(f"{where}: no such field") + there
    fault = str(first["msg"]).removeprefix("Value error, ")
    return _one_line(f"{where}: {fault}" if where else fault)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain values; a key that one mapping gives twice is an error, not the last one's.

    A key beside `<<` may still replace one that was merged in: that is what merging is for.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._own_keys_checked: set[Any] = set()

    def flatten_mapping(self, node: Any) -> None:
        """Merge other mappings in, after a look at the keys the mapping itself gives."""
        if node not in self._own_keys_checked:
            self._own_keys_checked.add(node)
            self._require_unique(node)
        super().flatten_mapping(node)

    def _require_unique(self, node: Any) -> None:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            special = key_node.tag in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
            key = (key_node.value,) if special else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue        # refused by whoever builds the mapping
            if key in seen:
                fault = f"the key {_cut(str(key_node.value), _LONGEST_FIELD)!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, fault, key_node.start_mark)
            seen.add(key)


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {_cut(key, _LONGEST_FIELD)!r} is given twice")
        out[key] = value
    return out


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _require_bounded(value: Any) -> None:
    """Raise RecursionError beyond MOST_NESTED levels, ValueError beyond MOST_REPEATED repeats.

    Level by level, each container once however often aliases name it: one that holds itself never
    ends, and so is nested too deeply.
    """
    level = {id(value): (value, 1)} if isinstance(value, _HOLDERS) else {}
    repeated = 0
    for _ in range(MOST_NESTED):
        below: dict[int, tuple[Any, int]] = {}
        for holder, times in level.values():
            repeated += (times - 1) * len(holder)
            for child in holder.values() if isinstance(holder, dict) else holder:
                if isinstance(child, _HOLDERS):
                    before = below.get(id(child), (child, 0))[1]
                    below[id(child)] = (child, before + times)
        if repeated > MOST_REPEATED:
            raise ValueError(f"its aliases repeat more than {MOST_REPEATED:,} values")
        if not below:
            return
        level = below
    raise RecursionError


def _marked(error: yaml.MarkedYAMLError) -> str:
    fault = ", ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return _one_line(place + fault)


def _said(error: Exception) -> str:
    text = str(error)
    if "set_int_max_str_digits" in text:        # advice for whoever writes Python
        return "a number has more digits than can be read"
    return _one_line(text) or type(error).__name__


def _one_line(text: str) -> str:
    return _cut(" ".join(text.split()), _LONGEST_FAULT)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
