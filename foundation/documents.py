"""Reading one YAML or JSON file that a person wrote, as a mapping, with errors of one line.

Knows files and text. Knows nothing of what the fields mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import InputError


def read_mapping(path: Path, what: str, fields: str) -> dict[str, Any]:
    """The file's mapping. what: "grid"; fields: what it must hold, for the message.

    JSON is read as the YAML it is. Raises InputError naming the file.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise InputError(f"{path}: not YAML that can be read: nested too deeply") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a {what} file is a mapping with {fields}")
    return data


def first_fault(error: ValidationError, known: str = "") -> str:
    """The first thing pydantic found, in one line: field and reason.

    known: the fields there are, said where one was not known.
    """
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: no such field" + (f"; there are: {known}" if known else "")
    said = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
