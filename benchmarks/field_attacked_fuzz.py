"""Two hundred damaged inputs and odd options over all verbs: none may end in a traceback or hang.

Most run in children forked from a process that has imported everything, a share in processes of
their own; half where only ASCII can be written, half on a terminal.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from field_attacked_inputs import DAMAGES, damaged, make_inputs

SEED, CASES, ALONE_EVERY = 15, 200, 10
LIMIT_S = 60.0
MEMORY_BYTES = 8 << 30
SHOWN_CODES = {0, 1, 2, 3}

STEPS = ("--step-tokens", "64", "--concurrency", "8")
LOAD = ("--requests", "8", "--rate", "100", "--prompt-tokens", "32", "--output-tokens", "4")
CLUSTER = ("--preset", "cpu", "--devices-per-node", "4")
QUICK = ("--effort", "fast", *STEPS)

# Verbs as typed; a word of `INPUTS` is a file. What would serve for ever, or measure for minutes,
# is asked for what it must refuse even where the damage does no harm.
VERBS: tuple[tuple[str, ...], ...] = (
    ("plan", "trace", *CLUSTER, *QUICK),
    ("plan", "ids.npz", *CLUSTER, *QUICK, "--out", "new.json"),
    ("plan", "ids.npy", "--num-experts", "8", *CLUSTER, *QUICK),
    ("plan", "sglang.pt", *CLUSTER, "--effort", "fast"),
    ("plan", "trace", "--cluster", "cluster.yaml", *QUICK),
    ("plan", "trace", "--current", "plan.json", "--model", "model.json", *CLUSTER, *QUICK),
    ("evaluate", "trace", "plan.json", "other.json", *STEPS),
    ("evaluate", "trace", "plan.json", "--current", "other.json", "--model", "checkpoint", *STEPS),
    ("simulate", "trace", "plan.json", "--model", "model.json", *LOAD),
    ("simulate", "trace", "plan.json", "--model", "model.json", "--faults", "faults.yaml", *LOAD),
    ("simulate", "trace", "plan.json", "--model", "model.json", "--arrivals", "arrivals.csv"),
    ("simulate", "trace", "plan.json", "--model", "model.json", "--arrivals", "arrivals.jsonl",
     "--report", "new.html"),
    ("replay", "trace", "plan.json", "--model", "model.json", *STEPS),
    ("whatif", "trace", "grid.yaml", "--model", "model.json", *LOAD, "--csv", "new.csv"),
    ("cache", "trace", "--slots", "3", "--model", "model.json", "--max-steps", "20"),
    ("plan-show", "plan.json"),
    ("plan-diff", "plan.json", "other.json", "--model", "model.json"),
    ("plan-export", "plan.json", "--format", "sglang", "--model", "model.json", "-o", "new.json"),
    ("plan-export", "plan.json", "--format", "trtllm", "--model", "checkpoint", "-o", "new.yaml"),
    ("plan-import", "sglang.json", "--format", "sglang", "--devices", "4", "-o", "new.json"),
    ("plan-import", "trtllm.yaml", "--format", "trtllm", "--devices", "4", "-o", "new.json"),
    ("plan-import", "vllm_ascend.json", "--format", "vllm_ascend", "-o", "new.json"),
    ("plan-import", "omni.npy", "--format", "omni", "-o", "new.json"),
    ("plan-import", "eplb.npz", "--format", "eplb", "--devices", "4", "-o", "new.json"),
    ("trace", "import", "ids.npz", "--out", "new"),
    ("trace", "import", "ids.npy", "--num-experts", "8", "--out", "new"),
    ("trace", "import", "sglang.pt", "--out", "new"),
    ("trace", "import", "responses.jsonl", "--num-experts", "8", "--out", "new"),
    ("trace", "import", "requests", "--num-experts", "8", "--out", "new"),
    ("trace", "info", "choices.csv", "--num-experts", "8", "--top-k", "2"),
    ("plan", "counts.csv", *CLUSTER, "--effort", "fast"),
    ("plan", "counts.jsonl", *CLUSTER, "--effort", "fast"),
    ("plan", "history.json", *CLUSTER, "--effort", "fast"),
    ("plan", "logical.json", *CLUSTER, "--effort", "fast"),
    ("plan", "loads.npy", "--axes", "LE", *CLUSTER, "--effort", "fast"),
    ("simulate", "trace", "plan.json", "--model", "checkpoint", "--arrivals", "burst.csv"),
    ("plan-import", "vllm.json", "--format", "vllm", "--devices", "4", "-o", "new.json"),
    ("trace", "info", "trace", "--devices", "4"),
    ("trace", "info", "ids.npz", "--devices", "4"),
    ("trace", "synth", "--layers", "2", "--experts", "8", "--top-k", "2", "--tokens", "500",
     "--out", "new"),
    ("trace", "record", "--model", "checkpoint", "--text", "words.txt", "--out", "new",
     "--max-tokens", "200"),
    ("schema", "plan"),
    ("example", "grid", "new.yaml"),
    ("run", "--model", "checkpoint", "--ranks", "3", "--plan", "plan.json"),
    ("apply", "plan.json", "--name", "nobody-runs-this"),
    ("calibrate", "--out", "plan.json", "--model", "model.json", "--ranks", "1"),
    ("demo", "--ranks", "1"),
    ("submit", "--address", "http://127.0.0.1:1", "--send", "trace", "--", "plan", "trace"),
)
REFUSED = ("run", "apply", "calibrate", "demo", "submit")
INPUTS = frozenset((
    "trace", "ids.npz", "ids.npy", "sglang.pt", "cluster.yaml", "plan.json", "other.json",
    "model.json", "checkpoint", "faults.yaml", "arrivals.csv", "arrivals.jsonl", "grid.yaml",
    "sglang.json", "trtllm.yaml", "responses.jsonl", "requests", "choices.csv", "counts.csv",
    "counts.jsonl", "history.json", "logical.json", "loads.npy", "burst.csv", "vllm.json",
    "vllm_ascend.json", "omni.npy", "eplb.npz", "words.txt",
))
ENDLESS = {"--help", "--address"}       # the latter has cases of its own
ODD = ("", "0", "-1", "nan", "inf", "1e309", "99999999999999999999", "0.5", "x", "ü±", "a\nb",
       "../..", "/dev/null", "[/red]", "{0}%s", "y" * 5000, "\udcff", "true", "1e-300")


@dataclass(frozen=True)
class Case:
    """One command to run."""

    number: int
    arguments: tuple[str, ...]
    damage: tuple[tuple[str, str], ...]      # (input, what befalls it)
    ascii_only: bool
    terminal: bool
    alone: bool                              # a process of its own, not a fork
    odd: tuple[str, str] | None = None       # (option, its odd value)


@dataclass
class Outcome:
    """How it ended."""

    case: Case
    code: int | None                         # None: it hung and was ended
    text: str
    seconds: float
    faults: list[str] = field(default_factory=list)


def cases(count: int = CASES, seed: int = SEED) -> list[Case]:
    """The same ones for one seed. Every verb comes in turn, so each is tried several times."""
    rng = random.Random(seed)
    return [_case(number, rng) for number in range(count)]


def _case(number: int, rng: random.Random) -> Case:
    arguments = list(VERBS[number % len(VERBS)])
    files = sorted(set(arguments[1:]) & INPUTS)
    damage: tuple[tuple[str, str], ...] = ()
    odd_option = rng.random() < 0.4 or not files
    if files and (not odd_option or rng.random() < 0.2):
        damage = ((rng.choice(files), rng.choice(sorted(DAMAGES))),)
    odd = _make_odd(arguments, rng) if odd_option else None
    return Case(number, tuple(arguments), damage, rng.random() < 0.5, rng.random() < 0.5,
                number % ALONE_EVERY == 0, odd)


def _make_odd(arguments: list[str], rng: random.Random) -> tuple[str, str]:
    """One option's value becomes an odd one, or an odd option comes along; which, and its value."""
    at = [n + 1 for n, word in enumerate(arguments[:-1])
          if word.startswith("-") and word != "--" and not arguments[n + 1].startswith("-")]
    if at and rng.random() < 0.4:
        place, value = rng.choice(at), rng.choice(ODD)
        arguments[place] = value
        return arguments[place - 1], value
    option, takes_value = rng.choice((*_options(arguments), ("--no-such-option", False)))
    value = rng.choice(ODD) if takes_value else ""
    where = arguments.index("--") if "--" in arguments else len(arguments)
    arguments[where:where] = [option, value] if takes_value else [option]
    return option, value


def _options(arguments: list[str]) -> list[tuple[str, bool]]:
    """What the verb knows: each option, and whether it takes a value."""
    import typer

    from loadmaster.cli.main import app

    command: Any = typer.main.get_command(app)
    for word in arguments:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    return sorted((one.opts[0], not one.is_flag) for one in command.params
                  if one.param_type_name == "option" and one.opts[0] not in ENDLESS)


# ---- running ----------------------------------------------------------------------------------


def run_all(wanted: list[Case], say: Any = lambda text: None) -> list[Outcome]:
    """All of them, each in a folder of its own with fresh inputs."""
    _import_everything()
    found = []
    with tempfile.TemporaryDirectory(prefix="attacked-") as folder:
        good = Path(folder) / "good"
        good.mkdir()
        make_inputs(good)
        for case in wanted:
            place = Path(folder) / f"case-{case.number}"
            shutil.copytree(good, place, symlinks=True)
            outcome = judge(run_case(case, place))
            found.append(outcome)
            if outcome.faults:
                say(f"case {case.number}: {outcome.faults}: {shown(outcome)}")
            shutil.rmtree(place, ignore_errors=True)
    return found


def _import_everything() -> None:
    """Before the forks: what every child would import by itself. Ray is left out: it does not
    outlive a fork."""
    import numba  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import loadmaster.cli.main
    import loadmaster.placement.planning.planner
    import loadmaster.simulator.serving.simulate  # noqa: F401


def run_case(case: Case, place: Path) -> Outcome:
    """Make the inputs of `place` as the case wants them, and run it there."""
    rng = random.Random(SEED * 1000 + case.number)
    names = {name: os.fspath(damaged(place / name, how, rng).relative_to(place))
             for name, how in case.damage}
    arguments = [case.arguments[0], *(names.get(word, word) for word in case.arguments[1:])]
    reader, writer = pty.openpty() if case.terminal else os.pipe()
    began = time.monotonic()
    pid = (_alone if case.alone else _forked)(case, arguments, place, writer)
    os.close(writer)
    text, ended = _read(reader, began + LIMIT_S)
    os.close(reader)
    code = _end(pid, ended)
    return Outcome(case, code, text.decode("utf-8", "backslashreplace"), time.monotonic() - began)


def _environment(case: Case, place: Path) -> dict[str, str]:
    """No one's home, tokens or cluster; the encoding that the case asks for."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LC_", "LANG"))}
    encoding = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return kept | {"HOME": str(place), "TMPDIR": str(place), "COLUMNS": "100"} | (
        encoding if case.ascii_only else {"PYTHONUTF8": "1"}
    )


def _alone(case: Case, arguments: list[str], place: Path, writer: int) -> int:
    encoded = [word.encode("utf-8", "surrogateescape") for word in arguments]
    command = [sys.executable, "-m", "loadmaster.cli", *encoded]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, cwd=place,
        env=_environment(case, place), start_new_session=True,
    ).pid


def _forked(case: Case, arguments: list[str], place: Path, writer: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(place)
        os.environ.clear()
        os.environ.update(_environment(case, place))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        encoding = "ascii" if case.ascii_only else "utf-8"
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), encoding=encoding)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb"), encoding=encoding, write_through=True,
                                      errors="backslashreplace")
        sys.argv = ["loadmaster", *arguments]
        code = _main()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def _main() -> int:
    import traceback

    from loadmaster.cli.main import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _read(reader: int, deadline: float) -> tuple[bytes, bool]:
    """All that is said until nobody can say more; False where time was up first."""
    text = b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([reader], [], [], left)
        if not ready:
            break
        try:
            part = os.read(reader, 1 << 16)
        except OSError:                  # the other end of a terminal is gone
            return text, True
        if not part:
            return text, True
        text += part
    return text, False


def _end(pid: int, ended: bool) -> int | None:
    """The exit code; None where it had to be ended."""
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- judging ----------------------------------------------------------------------------------


_DRAWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")      # what a terminal does with a text


def judge(outcome: Outcome) -> Outcome:
    """Fill in what must not be."""
    lines = _DRAWN.sub("", outcome.text).splitlines()
    said = [line for line in lines if line.startswith("loadmaster: ")]
    usage = any(line.startswith("Usage: ") for line in lines)
    if outcome.code is None:
        outcome.faults.append("hang")
    elif outcome.code not in SHOWN_CODES | ({4} if "evaluate" in outcome.case.arguments else set()):
        outcome.faults.append(f"exit code {outcome.code}")
    if "Traceback (most recent call last)" in outcome.text:
        outcome.faults.append("traceback")
    if outcome.case.ascii_only and not outcome.text.isascii():
        outcome.faults.append("not ASCII")
    failed = outcome.code in (1, 2, 3)
    # `whatif` prints its table and ends with 1 where no cell could be served.
    if failed and not said and not usage and "no scenario could be served" not in outcome.text:
        outcome.faults.append("no line says why")
    if outcome.code == 2 and said and not _names_the_oddity(outcome.case, said[0]):
        outcome.faults.append("the line does not name what was odd")
    if len(said) > 1 or (said and outcome.code == 0 and "submit" not in outcome.case.arguments):
        outcome.faults.append("more than one line of error, or one without a fault")
    return outcome


def _names_the_oddity(case: Case, line: str) -> bool:
    """Whether a usage error speaks of the one option that was odd, or of its value."""
    if case.damage or not case.odd or case.arguments[0] in REFUSED:
        return True
    option, value = case.odd
    return option in line or value[:20] in line


def shown(outcome: Outcome) -> str:
    """The case as typed, and the end of what it said."""
    case = outcome.case
    return (f"{' '.join(word[:60] for word in case.arguments)!r} {dict(case.damage)} -> "
            f"{outcome.code}: {outcome.text[-400:]!r}")
