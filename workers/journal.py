"""The journal of plan switches: what was intended, so that whoever comes after can finish or undo.

One folder per group. A line per phase, flushed to disk before the phase begins; each plan lies
beside it in a file of its own, written before the line that names it. Knows files. Knows nothing
of ranks. JSON only; a line cut off by a crash is no line.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError
from ..placement.plan import Plan
from .tables import PhasePlans

Phase = Literal["stage", "commit", "done", "abort"]
PHASES: tuple[Phase, ...] = ("stage", "commit", "done", "abort")
_LIFE = "life"      # a coordinator began to write


@dataclass(frozen=True)
class Standing:
    """What the journal says is in force, and what was under way when it ends."""

    plans: PhasePlans | None                  # None: the plans the group was started with
    epoch: int
    unfinished: PhasePlans | None = None      # the plans of a switch without an end
    unfinished_epoch: int = 0
    committing: bool = False                  # that switch had begun to commit: roll it forward


class Journal:
    """The journal of one group. One process writes it at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = self.folder / "journal.jsonl"

    def write(self, phase: Phase, epoch: int, plans: PhasePlans | None = None) -> None:
        """Note a phase; returns when it is on disk. `plans` are needed where a switch begins."""
        if plans is not None:
            for name, plan in (("prefill", plans.prefill), ("decode", plans.decode)):
                plan.save(self._plan_path(epoch, name))
        self._append(phase, epoch)

    def _append(self, phase: str, epoch: int) -> None:
        self._cut_torn_line()
        with open(self._path, "a", encoding="utf-8") as out:
            out.write(json.dumps({"phase": phase, "epoch": epoch}) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def begin_life(self) -> int:
        """A coordinator starts to lead this group; how many did so before it."""
        before = sum(phase == _LIFE for phase, _ in self._lines())
        self._append(_LIFE, 0)
        return before

    def read(self) -> Standing:
        """Where things stand. Raises InputError on a journal that is not one."""
        in_force = begun = 0
        committing = False
        for phase, epoch in self._lines():
            if phase == "stage":
                begun, committing = epoch, False
            elif phase == "commit":
                committing = True
            elif phase != _LIFE:
                in_force = epoch if phase == "done" else in_force
                begun, committing = 0, False
        return Standing(
            plans=self._plans(in_force) if in_force else None,
            epoch=max(in_force, 1),
            unfinished=self._plans(begun) if begun else None,
            unfinished_epoch=begun,
            committing=committing,
        )

    def _lines(self) -> list[tuple[str, int]]:
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").split("\n")
        found = []
        for number, line in enumerate(lines[:-1], start=1):    # the last has no end: cut off
            try:
                entry = json.loads(line)
                phase, epoch = entry["phase"], int(entry["epoch"])
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{self._path}:{number}: not a journal line: {error}") from error
            if phase not in (*PHASES, _LIFE):
                raise InputError(f"{self._path}:{number}: unknown phase {phase!r}")
            found.append((phase, epoch))
        return found

    def _cut_torn_line(self) -> None:
        """Drop what a crash left of a line, so that the next one starts on its own."""
        if self._path.exists():
            data = self._path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with open(self._path, "r+b") as file:
                    file.truncate(whole)

    def _plans(self, epoch: int) -> PhasePlans:
        prefill, decode = (self._plan_path(epoch, name) for name in ("prefill", "decode"))
        return PhasePlans(Plan.load(prefill), Plan.load(decode))

    def _plan_path(self, epoch: int, name: str) -> Path:
        return self.folder / f"plan-{epoch:06d}-{name}.json"
