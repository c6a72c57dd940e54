"""The real command line, run in this process, and what a section says of its files.

A row is one file: the command, its exit code, whether the answer is the expected one, and what was
said. Expected values are reckoned in the sections from the files themselves, by numpy and the
standard library, without the package.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadmaster.cli.main import main

FIELD = Path(__file__).resolve().parents[2] / "shared" / "data" / "field"

Row = dict[str, Any]


@dataclass(frozen=True)
class Ran:
    """One command's end."""

    command: str
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Everything it printed, in one line."""
        return " ".join((self.out + " " + self.err).split())


def run(*arguments: object) -> Ran:
    """`loadmaster` with these arguments; its streams caught."""
    words = [str(argument) for argument in arguments]
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["loadmaster", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return Ran(" ".join(words), code, out.getvalue(), err.getvalue())


def refused(ran: Ran, *words: str) -> bool:
    """Whether a command ended in one line that holds these words, and no traceback."""
    lines = [line for line in ran.err.splitlines() if line.startswith("loadmaster:")]
    return ran.code in (1, 2, 3) and len(lines) == 1 and "Traceback" not in ran.err and all(
        word in lines[0] for word in words
    )


def says(ran: Ran, *words: str) -> bool:
    """Whether a command that ended well said all of this."""
    return ran.code == 0 and all(word in ran.said for word in words)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder that goes again."""
    folder = Path(tempfile.mkdtemp(prefix="field-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def section(folder: Path, cases: dict[str, Callable[[Path], tuple[Ran, bool]]]) -> dict[str, Any]:
    """Every case, and whether every file of the folder is among them."""
    if not folder.is_dir():
        return {"holds": False, "why": f"inputs not present: {folder}"}
    rows: list[Row] = []
    for name, case in cases.items():
        with workplace() as place:
            try:
                ran, right = case(place)
                row = {"file": name, "command": ran.command.replace(str(place), "OUT"),
                       "exit": ran.code, "right": bool(right)}
                if not right or ran.code:
                    row["said"] = ran.said[:400]
            except Exception as error:   # a wrong answer that the check itself trips over
                row = {"file": name, "right": False, "said": f"{type(error).__name__}: {error}"}
            rows.append(row)
    held = sorted(p.name for p in folder.iterdir())
    tried = {name.split(" ")[0] for name in cases}
    left_out = [name for name in held if name not in tried]
    wrong = [row["file"] for row in rows if not row["right"]]
    return {
        "holds": not wrong and not left_out, "files": len(held), "commands": len(rows),
        "right": len(rows) - len(wrong), "wrong": wrong, "not_tried": left_out, "rows": rows,
    }
