"""Where a running group leaves what others on this machine need: its address and its journal.

One folder per user and group under the system's temporary directory, the owner's alone. Knows
files. Knows nothing of Ray or of what the journal says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from ...errors import InputError, LoadmasterError, UsageError
from ...foundation.documents import read_json
from ...foundation.lock import Lock

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """Raise UsageError unless the name can be a group's: it names files and actors."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a group: use up to 64 letters, digits, '.', '_' and '-'"
        )


def group_folder(name: str, *, fresh: bool = False) -> Path:
    """The folder of a group; made if it is missing. fresh: whatever lay there is removed.

    Raises LoadmasterError when the place belongs to someone else.
    """
    check_name(name)
    root = Path(tempfile.gettempdir()) / f"loadmaster-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    state = root.lstat()
    if root.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise LoadmasterError(
            f"{root} is not a folder of yours alone: remove it, or set TMPDIR to another place"
        )
    folder = root / name
    if fresh and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def naming(name: str) -> Lock:
    """Held while a group of that name is being started, so that two starts cannot both find it
    free."""
    return Lock(group_folder(name).parent / f".{name}.lock")


def write_address(name: str, address: str) -> None:
    """Note which Ray cluster a group runs on."""
    path = group_folder(name) / "address.json"
    path.write_text(json.dumps({"address": address}), encoding="utf-8")


def read_address(name: str) -> str | None:
    """The Ray cluster that a group on this machine was started on; None when none was noted."""
    path = group_folder(name) / "address.json"
    try:
        address = read_json(path)["address"]
    except (InputError, KeyError, TypeError):
        return None
    return str(address)


def remove(name: str) -> None:
    """The group has ended: nothing of its folder is needed."""
    shutil.rmtree(group_folder(name), ignore_errors=True)
