"""Random streams: one per cause, so that changing one cause leaves the draws of the others alone.

Two runs with the same seed see the same arrivals, routing, jitter and failures whatever plan is in
force: their difference is the plan's. Knows names and seeds only.
"""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, cause: str, index: int = 0) -> np.random.Generator:
    """The generator of one cause ("routing", "jitter", ...); `index` distinguishes siblings."""
    return np.random.default_rng([seed, zlib.crc32(cause.encode()), index])
