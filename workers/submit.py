"""A verb of the command line as a Ray job: sent with the package and its files, followed, fetched.

Knows Ray's job API over HTTP. Knows nothing of what the verb does. The package travels in the
job's runtime environment, so the cluster needs its dependencies but not loadmaster itself.
Results come back through the job's log, marked, so that nothing but the job API must be reachable.
"""

from __future__ import annotations

import base64
import importlib
import io
import os
import shlex
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LoadmasterError, UsageError

RESULT_MARK = "LOADMASTER-RESULT "
_LINE_BYTES = 60_000
_FLOORS = ("traces", "kernels", "placement", "simulator", "workers")
_KEPT = {".py", ".yaml", ".json", ".html", ".safetensors", ".md", ".typed", ".txt"}
_POLL_S = 1.0
_READY_S = 60.0


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
    brought back. on_line: called with each line of the job's log. Ctrl-C stops the job. Raises
    UsageError for a cluster without a token or a missing input, LoadmasterError when the job could
    not run at all; a verb that failed is in `exit_code`.
    """
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="loadmaster-job-") as folder:
        work, package = Path(folder) / "work", Path(folder) / "loadmaster"
        command = _pack(arguments, inputs, outputs, work)
        _copy_package(package)
        entrypoint = "python -m loadmaster.workers.job_entry " + shlex.join(command)
        environment = {"working_dir": str(work), "py_modules": [str(package)]}
        job = _send(client, entrypoint, environment)
        try:
            log = _follow(client, job, on_line)
        except BaseException:
            client.stop_job(job)
            raise
    return _finish(client, job, log, outputs)


def _client(address: str) -> Any:
    host = address.rsplit("://", 1)[-1].rsplit(":", 1)[0]
    local = host in ("127.0.0.1", "localhost")
    if not local and os.environ.get("RAY_AUTH_MODE") != "token":
        raise UsageError(
            f"{address}: another machine's cluster is used with token authentication only; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        )
    jobs: Any = importlib.import_module("ray.job_submission")
    try:
        return jobs.JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise LoadmasterError(
            f"no Ray dashboard answers at {address}: {str(error).splitlines()[0]}"
        ) from error


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
                    f"the cluster did not take the job: {str(error).splitlines()[0]}{hint}"
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
        target = f"in/{number}/{path.name}"
        (work / "in" / str(number)).mkdir()
        if path.is_dir():
            shutil.copytree(path, work / target)
        else:
            shutil.copy(path, work / target)
        names[str(path)] = target
    for number, path in enumerate(outputs):
        names[str(path)] = f"out/{number}-{path.name}"
    return [names.get(a, a) for a in arguments]


def _copy_package(target: Path) -> None:
    """The package as it is installed here: code and data files of its five folders."""
    root = Path(__file__).resolve().parents[1]
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


def _follow(client: Any, job: str, on_line: Callable[[str], None]) -> str:
    """Hand on the job's log as it grows; all of it, once the job has ended."""
    shown = 0
    while True:
        ended = client.get_job_status(job).is_terminal()
        log: str = client.get_job_logs(job)
        whole = log if ended else log[: log.rfind("\n") + 1]
        for line in whole[shown:].splitlines():
            if not line.startswith(RESULT_MARK):
                on_line(line)
        shown = len(whole)
        if ended:
            return log
        time.sleep(_POLL_S)


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
            name = f"{number}-{path.name}"
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
