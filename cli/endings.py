"""How a verb ends that is told to end: by Ctrl-C, SIGTERM, or the terminal that closes.

Knows signals. Each is a KeyboardInterrupt to the verb, so that it ends what it has started. A
signal that was ignored before (nohup) stays ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_endings() -> None:
    """From here on."""
    if threading.current_thread() is not threading.main_thread():
        return
    for ending in _ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, signal.default_int_handler)


def ignore_endings() -> None:
    """While what was started is being ended: a second signal changes nothing."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_IGN)


@contextmanager
def interrupted_on_endings() -> Iterator[None]:
    """Meanwhile; the handlers before are back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {ending: signal.getsignal(ending) for ending in _ENDINGS}
    interrupt_on_endings()
    try:
        yield
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)
