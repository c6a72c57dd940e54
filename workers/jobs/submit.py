"""A verb of the command line as a Ray job: sent with the package and its files, followed, fetched.

Knows Ray's job API over HTTP. Knows nothing of what the verb does. The package travels in the
job's runtime environment, so the cluster needs its dependencies but not loadmaster itself.
Results come back through the job's log, marked, so that nothing but the job API must be reachable.
"""

from __future__ import annotations

import base64
import http.client
import importlib
import io
import os
import shlex
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError, RayError

from ...errors import LoadmasterError, UsageError
from ...foundation.compiled import travelling_cache
from ..fleet.crossing import crossed
from ..fleet.joining import ANSWER_S, NothingAnswersError, require_token, token_refused

RESULT_MARK = "LOADMASTER-RESULT "
_LINE_BYTES = 60_000
_FLOORS = ("foundation", "traces", "kernels", "placement", "simulator", "workers", "app", "cli")
_KEPT = {".py", ".yaml", ".json", ".html", ".safetensors", ".md", ".typed", ".txt"}
_JOIN = ("run", "apply")      # verbs that look for a cluster, or start one
_POLL_S = 1.0
_READY_S = 60.0
_SILENCE_S = 60.0             # of the dashboard, until we give up following
_SAY_S = 15.0                 # of the job, until we say that it is there
STOP_GRACE_S = 30


@dataclass(frozen=True)
class JobResult:
    """How a job ended."""

    job: str
    exit_code: int
    fetched: tuple[Path, ...]


def submit(
    address: str,
    arguments: Sequence[str],
    *,
    inputs: Sequence[Path] = (),
    outputs: Sequence[Path] = (),
    on_line: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> JobResult:
    """Run `loadmaster ARGUMENTS` on the cluster whose dashboard is at `address`, and wait.

    inputs: files and folders among the arguments, sent along. outputs: files among the arguments,
    brought back. on_line: called with each line of the job's log, and now and then with how long
    the job has been silent. Ctrl-C stops the job, and waits until it has cleaned up; a dashboard
    that does not answer for a while does not. Raises UsageError for a cluster without a token, a
    missing input or a place where no output can be written, LoadmasterError when the job could
    not run at all; a verb that failed is in `exit_code`.
    """
    for path in outputs:
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}: make it first")
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="loadmaster-job-") as folder:
        work, package = Path(folder) / "work", Path(folder) / "loadmaster"
        command = _pack(_joining(arguments), inputs, outputs, work)
        _copy_package(package)
        entrypoint = "python -m loadmaster.cli.job_entry " + shlex.join(command)
        environment = {
            "working_dir": str(work), "py_modules": [str(package)],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)},
        }
        job = _send(client, entrypoint, environment)
        log = follow(client, job, on_line)
    return _finish(client, job, log, outputs)


def _joining(arguments: Sequence[str]) -> list[str]:
    """The arguments; live workers of a job are to run on its cluster, not on one of their own."""
    named = any(a == "--address" or a.startswith("--address=") for a in arguments)
    joins = bool(arguments) and arguments[0] in _JOIN and not named
    return [*arguments, "--address", "auto"] if joins else list(arguments)


def _client(address: str) -> Any:
    require_token(address, _host(address))
    _require_dashboard(address)
    jobs: Any = importlib.import_module("ray.job_submission")
    try:
        return jobs.JobSubmissionClient(address)
    except AuthenticationError as error:
        raise token_refused(address) from error
    except (OSError, RuntimeError, RayError) as error:
        raise crossed(error, f"no Ray dashboard answers at {address}") from error


def _require_dashboard(address: str) -> None:
    """Raises NothingAnswersError within seconds; Ray's own client waits without end."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return          # it is there; what it thinks of our token comes next
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise NothingAnswersError(
            f"no Ray dashboard answers at {address} ({reason}): check that the cluster runs, and "
            "that this is the address `ray start --head` printed for its dashboard"
        ) from error


def _host(address: str) -> str:
    """The address's host. Raises UsageError for what is no dashboard's address."""
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or not address.startswith(("http://", "https://")):
        raise UsageError(f"{address!r} is no address of a dashboard: http://HOST:PORT")
    return host


def _send(client: Any, entrypoint: str, environment: dict[str, Any]) -> str:
    """Submit, waiting for a cluster that has only just come up. Raises LoadmasterError."""
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))
        except RuntimeError as error:
            no_agent = "No available agent" in str(error)
            if not no_agent or time.monotonic() > deadline:
                hint = (
                    "; its agent never came up: is another cluster on that machine using the "
                    "agent's port? (ray start --dashboard-agent-listen-port)" if no_agent else ""
                )
                raise LoadmasterError(
                    f"the cluster did not take the job: {_first_line(error)}{hint}"
                ) from error
            time.sleep(_POLL_S)


def _pack(
    arguments: Sequence[str], inputs: Sequence[Path], outputs: Sequence[Path], work: Path
) -> list[str]:
    """Copy the inputs into the job's folder; the arguments, with paths as the job sees them."""
    names: dict[str, str] = {}
    (work / "in").mkdir(parents=True)
    (work / "out").mkdir()
    (work / "out" / ".keep").touch()
    for number, path in enumerate(inputs):
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder to send")
        target = f"in/{number}/{path.resolve().name}"
        (work / "in" / str(number)).mkdir()
        if path.is_dir():
            shutil.copytree(path, work / target)
        else:
            shutil.copy(path, work / target)
        names[os.path.abspath(path)] = target
    for number, path in enumerate(outputs):
        names[os.path.abspath(path)] = _out_name(number, path)
    return [*arguments[:1], *(_renamed(a, names) for a in arguments[1:])]


def _out_name(number: int, path: Path) -> str:
    return f"out/{number}-{path.name}"


def _renamed(argument: str, names: dict[str, str]) -> str:
    """The argument, or `--option=argument`, as the job sees it: a file that travels, however it
    was written, or one inside a folder that travels, under its new name."""
    option, equals, value = argument.partition("=")
    if argument.startswith("--") and equals:
        return f"{option}={_renamed(value, names)}"
    if not argument or argument.startswith("-"):
        return argument
    whole = os.path.abspath(argument)
    for own, name in names.items():
        if whole == own:
            return name
        if whole.startswith(own + os.sep):
            return name + whole[len(own) :]
    return argument


def _copy_package(target: Path) -> None:
    """The package as it is installed here: code and data files of its folders, and what is compiled
    of its loops, so that a machine of the same kind need not compile for a minute first."""
    root = Path(__file__).resolve().parents[2]
    target.mkdir()
    for path in [*sorted(root.glob("*.py")), root / "py.typed"]:
        if path.exists():
            shutil.copy(path, target)
    for floor in _FLOORS:
        for path in sorted((root / floor).rglob("*")):
            if path.is_file() and path.suffix in _KEPT:
                copy = target / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
                _copy_compiled(path, copy)


def _copy_compiled(source: Path, copy: Path) -> None:
    if source.suffix == ".py":
        for path in travelling_cache(source):
            kept = copy.parent / "__pycache__" / path.name
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(path, kept)


def follow(
    client: Any, job: str, on_line: Callable[[str], None], *, poll_s: float = _POLL_S
) -> str:
    """Hand on the job's log as it grows; all of it, once the job has ended.

    Ctrl-C stops the job. Raises LoadmasterError, and leaves the job alone, when the dashboard has
    not answered for a minute.
    """
    reader = _LogReader(client, job, on_line)
    try:
        while not reader.read():
            time.sleep(poll_s)
    except KeyboardInterrupt:
        _stop(client, job, reader, poll_s)
        raise
    return reader.log


class _LogReader:
    """Reads a job's log through a dashboard that may fail to answer for a while."""

    def __init__(self, client: Any, job: str, on_line: Callable[[str], None]) -> None:
        self._client, self._job, self._on_line = client, job, on_line
        self._shown = 0
        self._answered = self._spoke = self._began = time.monotonic()
        self.log = ""

    def read(self) -> bool:
        """Hand on what is new; whether the job has ended."""
        try:
            status = self._client.get_job_status(self._job)
            self.log = self._client.get_job_logs(self._job)
        except (OSError, RuntimeError) as error:      # requests' errors are OSErrors
            if time.monotonic() - self._answered > _SILENCE_S:
                raise LoadmasterError(
                    f"the dashboard has not answered for {_SILENCE_S:.0f} s: {_first_line(error)}; "
                    f"job {self._job} goes on (ray job logs --follow {self._job})"
                ) from error
            return False
        self._answered = time.monotonic()
        ended = bool(status.is_terminal())
        self._hand_on(self.log if ended else self.log[: self.log.rfind("\n") + 1])
        if not ended and time.monotonic() - self._spoke > _SAY_S:
            self.say(f"job {self._job}: {status}, {time.monotonic() - self._began:.0f} s so far")
        return ended

    def _hand_on(self, whole: str) -> None:
        new, self._shown = whole[self._shown :], len(whole)
        for line in new.splitlines():
            if not line.startswith(RESULT_MARK):
                self.say(line)

    def say(self, line: str) -> None:
        """A line for whoever waits."""
        self._spoke = time.monotonic()
        self._on_line(line)


def _stop(client: Any, job: str, reader: _LogReader, poll_s: float) -> None:
    """Stop the job, and stay until it has ended what it had started."""
    reader.say(f"stopping job {job}: it gets {STOP_GRACE_S} s to end what it has started")
    try:
        client.stop_job(job)
        deadline = time.monotonic() + STOP_GRACE_S + 5.0
        while not reader.read() and time.monotonic() < deadline:
            time.sleep(poll_s)
    except (LoadmasterError, OSError, RuntimeError) as error:
        reader.say(f"job {job} may still run ({_first_line(error)}): ray job stop {job}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _finish(client: Any, job: str, log: str, outputs: Sequence[Path]) -> JobResult:
    marked = [x[len(RESULT_MARK) :] for x in log.splitlines() if x.startswith(RESULT_MARK)]
    if not marked:
        info = client.get_job_info(job)
        raise LoadmasterError(f"job {job} ended without a result: {info.message}")
    code, _, rest = "".join(marked).partition(";")
    fetched = []
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(rest))) as archive:
        held = set(archive.namelist())
        for number, path in enumerate(outputs):
            name = _out_name(number, path).removeprefix("out/")
            if name in held:
                part = path.with_name(f".{path.name}.part")
                part.write_bytes(archive.read(name))
                os.replace(part, path)
                fetched.append(path)
    return JobResult(job, int(code), tuple(fetched))


def print_result(exit_code: int, folder: Path) -> None:
    """In the job: print the exit code and the files of `folder` as marked lines."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name != ".keep":
                archive.write(path, path.name)
    text = f"{exit_code};{base64.b64encode(buffer.getvalue()).decode()}"
    for start in range(0, len(text), _LINE_BYTES):
        print(RESULT_MARK + text[start : start + _LINE_BYTES], flush=True)
