"""Other libraries' talk, silenced while we use them: what happens is reported once, by us.

Errors still come through. Knows transformers' and Ray's switches; imports neither by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

_LOCK = threading.Lock()
_loading = 0                    # threads inside `quiet_transformers`
_before: tuple[int, bool] = (logging.WARNING, True)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no warnings of transformers meanwhile; several threads may load at once."""
    global _loading, _before
    its: Any = importlib.import_module("transformers.utils.logging")
    with _LOCK:
        if _loading == 0:
            _before = (its.get_verbosity(), its.is_progress_bar_enabled())
            its.set_verbosity_error()
            its.disable_progress_bar()
        _loading += 1
    try:
        yield
    finally:
        with _LOCK:
            _loading -= 1
            if _loading == 0:
                verbosity, bars = _before
                its.set_verbosity(verbosity)
                if bars:
                    its.enable_progress_bar()


def quiet_ray() -> None:
    """Ray's lines about a cluster that starts, joins or ends are not shown; its warnings are."""
    logging.getLogger("ray").setLevel(logging.WARNING)
