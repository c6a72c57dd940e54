"""Errors that come out of another process, as one line of ours.

Knows Ray's kinds of errors. What was raised there as ours comes out as it went in; of everything
else the line says where it happened, what it was and where the whole story lies.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from typing import Any

from ray import exceptions as its

from ...errors import LoadmasterError

# Ray declares few of its types.
ray: Any = importlib.import_module("ray")

_OWN_NAME = re.compile(r"^loadmaster(\.\w+)+: ")      # of our errors, as a traceback writes them


def crossed(error: BaseException, where: str = "Ray") -> LoadmasterError:
    """An error of Ray's as ours. where: whose process it came from, as "rank 2"."""
    if isinstance(error, LoadmasterError) and not isinstance(error, its.RayTaskError):
        return error
    if isinstance(error, its.RayTaskError):
        return _raised(error, where)
    if isinstance(error, its.ActorDiedError) and error.actor_init_failed:
        return LoadmasterError(f"{where} did not start: {_first_line(error)}{_logs()}")
    if isinstance(error, its.GetTimeoutError):
        return LoadmasterError(f"{where}: no answer in time; what was asked may still happen")
    if isinstance(error, its.AuthenticationError):
        return LoadmasterError(
            f"{where}: the cluster does not take our token: set RAY_AUTH_TOKEN to the cluster's"
        )
    if isinstance(error, its.OutOfMemoryError):
        return LoadmasterError(
            f"{where}: Ray ended the process because its node ran out of memory: use fewer ranks "
            "or tasks at once, or a larger machine"
        )
    if isinstance(error, its.RayActorError | its.WorkerCrashedError | its.NodeDiedError):
        return LoadmasterError(f"{where}: its process died: {_first_line(error)}{_logs()}")
    if isinstance(error, its.TaskCancelledError):
        return LoadmasterError(f"{where}: was cancelled before it was done")
    if isinstance(error, its.UnserializableException) or not isinstance(error, its.RayError):
        return LoadmasterError(f"{where}: {_first_line(error)}{_logs()}")
    return LoadmasterError(f"{where}: {type(error).__name__}: {_first_line(error)}{_logs()}")


def _raised(error: its.RayTaskError, where: str) -> LoadmasterError:
    """What code over there raised, whatever wrapped it on its way."""
    cause = error.cause
    if isinstance(cause, its.RayTaskError):
        return _raised(cause, where)
    if isinstance(cause, LoadmasterError):
        return cause
    if isinstance(cause, its.RayError) and type(cause) is not its.RayError:
        return crossed(cause, where)
    if isinstance(cause, its.RayError):      # stands for one that cannot travel
        return LoadmasterError(f"{where}: {_first_line(cause)}{_logs()}")
    if isinstance(cause, MemoryError):
        return LoadmasterError(f"{where}: out of memory: use fewer tokens or a larger machine")
    if isinstance(cause, OSError) and cause.strerror:
        place = f"{cause.filename}: " if cause.filename else ""
        return LoadmasterError(f"{where}: {place}{cause.strerror}{_logs()}")
    kind, said = type(cause).__name__, _first_line(cause)
    return LoadmasterError(f"{where}: {said if said == kind else f'{kind}: {said}'}{_logs()}")


def _first_line(error: BaseException) -> str:
    """What it says, in its first line; where that is a traceback, the first after the last call."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    calls = [n for n, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[calls[-1] :] if calls else lines
    said = [line for line in after if not line.startswith(" ")] or lines
    return _OWN_NAME.sub("", said[0].strip()) if said else type(error).__name__


def _logs() -> str:
    """Where the traceback lies."""
    with contextlib.suppress(Exception):     # no cluster, or one that is going
        folder = ray._private.worker._global_node.get_logs_dir_path()
        return f" (its log is in {folder})"
    return ""
