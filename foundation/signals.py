"""What becomes of signals while libraries start processes and set handlers of their own.

Knows signals. Knows nothing of what is started.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hangups_held_back() -> Iterator[None]:
    """SIGHUP waits meanwhile; whatever is started here never sees one, and ends when we end it.

    Children inherit that it is blocked. Another thread of ours may still take one: it is noted, and
    raised afterwards.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGHUP)
    ours = threading.current_thread() is threading.main_thread() and before != signal.SIG_IGN
    if ours:
        signal.signal(signal.SIGHUP, lambda number, _frame: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGHUP, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGHUP)


@contextmanager
def terminations_kept() -> Iterator[None]:
    """SIGTERM does afterwards what it did before, where that was something of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        own = callable(before) or before == signal.SIG_IGN
        if own and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
