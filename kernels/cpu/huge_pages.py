"""Ask Linux to back a stretch of memory with huge pages, and make nothing of a refusal.

Decode streams every active expert's weights once per step; with 4 KiB pages a tenth of that time
goes to address translation. Knows addresses and lengths only.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

_HUGE_PAGE_BYTES = 1 << 21
# Smaller stretches stay in cache between steps and gain nothing.
_LEAST_BYTES = 1 << 18
_MADV_COLLAPSE = 25  # Linux 6.1: replace the pages of a range by huge ones, now


@functools.cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def use_huge_pages(address: int, size_bytes: int) -> bool:
    """Move the pages that hold a stretch of memory into huge pages; contents stay.

    The stretch is widened to whole huge pages, so what is next to it moves too. Returns whether
    the kernel did it all; short stretches, older kernels, other systems and full memory give False.
    """
    madvise = _madvise()
    if madvise is None or size_bytes < _LEAST_BYTES:
        return False
    start = address // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    stop = -(-(address + size_bytes) // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    done: bool = madvise(start, stop - start, _MADV_COLLAPSE) == 0
    return done
