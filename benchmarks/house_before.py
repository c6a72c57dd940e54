"""The two trees that the house is compared in: the commit before it, and the checkout at hand.

A tree must be called `loadmaster` to be the package, so the commit is unpacked into a folder of
that name in the system's temporary folder and kept there for the next run (compiled loops are
cached beside their sources), and the checkout is reached through a link of that name.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

BEFORE = "72e2554"
CHECKOUT = Path(__file__).resolve().parents[1]


class NotRunError(Exception):
    """A section cannot be run here; the text says why."""


def before(checkout: Path = CHECKOUT) -> Path:
    """The tree of the commit before the house. Raises NotRunError where history lacks it."""
    home = Path(tempfile.gettempdir()) / f"loadmaster-{BEFORE}-{os.getuid()}"
    tree = home / "loadmaster"
    if (home / "whole").exists():
        return tree
    packed = subprocess.run(
        ["git", "-C", checkout, "archive", BEFORE], capture_output=True, check=False
    )
    if packed.returncode:
        raise NotRunError(
            f"commit {BEFORE} is not in this checkout's history: fetch it whole "
            "(git fetch --unshallow)"
        )
    tree.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(tree, filter="data")
    (home / "whole").touch()
    return tree


@contextlib.contextmanager
def named(checkout: Path = CHECKOUT) -> Iterator[Path]:
    """The checkout under the name `loadmaster`."""
    if checkout.name == "loadmaster":
        yield checkout
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "loadmaster"
        link.symlink_to(checkout, target_is_directory=True)
        yield link


def python_in(tree: Path, *words: object) -> subprocess.Popen[str]:
    """This interpreter with `tree` as the package, one thread per library, nothing of a GPU."""
    found = os.environ | {
        "PYTHONPATH": str(tree.parent), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
        "PYTHONHASHSEED": "0",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=found, cwd=tempfile.gettempdir(),
        stdout=subprocess.PIPE, text=True,
    )
