"""Ranks to cores: where more ranks than cores share a machine, which of them meet must not change.

A measurement that compares plans needs it: two busy ranks that happen to meet on a core slow each
other down, whatever the plan. Knows processes of this machine. Knows nothing of groups or plans.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import suppress


def pin_in_turn(pids: Sequence[int]) -> None:
    """Every thread of each process to one core, the cores this process may use in turn.

    Nothing happens where the system knows no affinity, and to processes that have ended.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    for pid, core in zip(pids, cores, strict=False):
        with suppress(ProcessLookupError, FileNotFoundError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(thread), {core})
