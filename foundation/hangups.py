"""Processes that we start and that must outlive the terminal for as long as it takes to end them.

Knows signals. Knows nothing of what is started.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hangups_held_back() -> Iterator[None]:
    """SIGHUP waits meanwhile; whatever is started here never sees one, and ends when we end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
