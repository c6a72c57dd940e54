"""The journal of a group: what was intended, so that whoever comes after can finish or undo.

One folder per group. A line per phase of a plan switch or change of size, flushed to disk before
the phase begins; each plan is in a file of its own next to it, written before the line that names
it, and deleted when no phase can need it. Also what callers switched on. Knows files. Knows nothing
of ranks. JSON only; a line cut off by a crash is no line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError, LoadmasterError
from ...foundation.documents import parse_json, read_text
from ...foundation.lock import Lock
from ...placement.plan import Plan
from ..protocol.phase_plans import PhasePlans

Phase = Literal["stage", "commit", "done", "abort"]
PHASES: tuple[Phase, ...] = ("stage", "commit", "done", "abort")
_LIFE = "life"      # a coordinator began to write
_STATE = "state"    # what is switched on from here on


class JournalError(LoadmasterError):
    """The journal cannot be written: what it was to say must not happen."""


@dataclass(frozen=True)
class Switches:
    """What callers have switched on or set, and must find as they left it."""

    recording: bool = False
    digests: bool = False
    all_logits: bool = False
    step_tokens: int | None = None      # None: as the group was started
    domains: tuple[str, ...] = ()       # names of requests' domains, by number


@dataclass(frozen=True)
class JournalState:
    """The plan that the journal names as active, and what was under way when it ends."""

    plans: PhasePlans | None                  # None: the plans the group was started with
    epoch: int
    unfinished: PhasePlans | None = None      # the plans of a switch without an end
    unfinished_epoch: int = 0
    committing: bool = False                  # that switch had begun to commit: roll it forward
    switches: Switches = field(default_factory=Switches)


@dataclass
class _Read:
    """The journal's lines, taken one by one."""

    active: int = 0
    begun: int = 0
    committing: bool = False
    switches: Switches = field(default_factory=Switches)

    def take(self, phase: str, epoch: int, entry: dict[str, Any]) -> None:
        if phase == "stage":
            if self.committing:       # its end could not be written any more
                self.active = self.begun
            self.begun, self.committing = epoch, False
        elif phase == "commit":
            self.committing = True
        elif phase in ("done", "abort"):
            self.active = epoch if phase == "done" else self.active
            self.begun, self.committing = 0, False
        elif phase == _STATE:
            values = {f.name: entry[f.name] for f in dataclasses.fields(Switches)}
            self.switches = Switches(**values | {"domains": tuple(values["domains"])})


def journal_lock(folder: str | Path) -> Lock:
    """What whoever writes a journal holds for as long as it lives."""
    return Lock(Path(folder) / "lock")


class Journal:
    """The journal of one group. One process writes it at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = self.folder / "journal.jsonl"

    # ---- writing ---------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything: another group begins. Only the journal's own files are removed."""
        self._path.unlink(missing_ok=True)
        for path, _ in self._plan_files():
            path.unlink(missing_ok=True)

    def write(self, phase: Phase, epoch: int, plans: PhasePlans | None = None) -> None:
        """Note a phase; returns when it is on disk. `plans` are needed where a switch begins.

        Raises JournalError when that cannot be done.
        """
        try:
            if plans is not None:
                for name, plan in (("prefill", plans.prefill), ("decode", plans.decode)):
                    plan.save(self._plan_path(epoch, name))
            self._append(phase, epoch)
            self._drop_plans(phase, epoch)
        except OSError as error:
            raise JournalError(
                f"{self._path}: cannot be written: {error.strerror}: make room, then try again"
            ) from error

    def resize(self, epoch: int, plans: PhasePlans) -> None:
        """The group is about to become that of these plans; nothing can undo it from here on."""
        self.write("stage", epoch, plans)
        self.write("commit", epoch)

    def try_resize(self, epoch: int, plans: PhasePlans) -> None:
        """`resize`, where it happens whether it can be noted or not."""
        with contextlib.suppress(JournalError):
            self.resize(epoch, plans)

    def try_write(self, phase: Phase, epoch: int) -> None:
        """`write`, where it has happened already: a successor finds the same without the line."""
        with contextlib.suppress(JournalError):
            self.write(phase, epoch)

    def try_switch(self, switches: Switches) -> None:
        """Note what is switched on from here on; a disk that is full must not stop the serving."""
        with contextlib.suppress(OSError):
            self._append(_STATE, 0, dataclasses.asdict(switches))

    def begin_life(self) -> int:
        """A coordinator starts to lead this group; how many did so before it."""
        before = sum(phase == _LIFE for phase, _, _ in self._lines())
        self._append(_LIFE, 0)
        return before

    def _append(self, phase: str, epoch: int, more: dict[str, Any] | None = None) -> None:
        self._cut_torn_line()
        with open(self._path, "a", encoding="utf-8") as out:
            out.write(json.dumps({"phase": phase, "epoch": epoch, **(more or {})}) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def _cut_torn_line(self) -> None:
        """Drop what a crash left of a line, so that the next one starts on its own."""
        if self._path.exists():
            data = self._path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with open(self._path, "r+b") as file:
                    file.truncate(whole)

    def _drop_plans(self, phase: str, epoch: int) -> None:
        """After a switch has ended, only the active plans are needed, and those that follow."""
        for path, number in self._plan_files():
            if (phase == "done" and number < epoch) or (phase == "abort" and number == epoch):
                path.unlink(missing_ok=True)

    # ---- reading ---------------------------------------------------------------------------

    def read(self) -> JournalState:
        """The state it describes. Raises InputError on a journal that is not one."""
        found = _Read()
        for phase, epoch, entry in self._lines():
            found.take(phase, epoch, entry)
        return JournalState(
            plans=self._plans(found.active) if found.active else None,
            epoch=max(found.active, 1),
            unfinished=self._plans(found.begun) if found.begun else None,
            unfinished_epoch=found.begun,
            committing=found.committing,
            switches=found.switches,
        )

    def _lines(self) -> list[tuple[str, int, dict[str, Any]]]:
        if not self._path.exists():
            return []
        lines = read_text(self._path, "journal").split("\n")
        found = []
        for number, line in enumerate(lines[:-1], start=1):    # the last has no end: cut off
            where = f"{self._path}:{number}"
            entry = parse_json(line, where)
            try:
                phase, epoch = entry["phase"], int(entry["epoch"])
                if phase == _STATE:
                    _Read().take(phase, epoch, entry)
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise InputError(f"{where}: not a journal line: {error}") from error
            if phase not in (*PHASES, _LIFE, _STATE):
                raise InputError(f"{where}: unknown phase {phase!r}")
            found.append((phase, epoch, entry))
        return found

    def _plans(self, epoch: int) -> PhasePlans:
        prefill, decode = (self._plan_path(epoch, name) for name in ("prefill", "decode"))
        return PhasePlans(Plan.load(prefill), Plan.load(decode))

    def _plan_path(self, epoch: int, name: str) -> Path:
        return self.folder / f"plan-{epoch:06d}-{name}.json"

    def _plan_files(self) -> Iterator[tuple[Path, int]]:
        """Every plan's file and its epoch."""
        for path in sorted(self.folder.glob("plan-*-*.json")):
            number = path.name.split("-")[1]
            if number.isdigit():
                yield path, int(number)
