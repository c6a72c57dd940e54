"""One route in many tokens: warm-up and dummy passes, or padding that an engine routed.

Looked for in a sample of the tokens, then counted in all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .found_routes import FoundRoutes, Ids, routed_T

MANY = 0.2                   # of the tokens on one route: then it is suspected
SAMPLE_TOKENS = 65_536
FEWEST_TOKENS, FEWEST_CHOICES = 8, 4     # below, equal routes are no surprise


class Repeated(NamedTuple):
    """A route [L, K], how many tokens take it, and the first of them."""

    route: Ids
    tokens: int
    first: int


def repeated_route(found: FoundRoutes, rows: tuple[int, ...]) -> Repeated | None:
    """The route of many tokens; None where there is none."""
    ids = found.ids_TRK
    evenly = np.linspace(0, len(ids) - 1, min(len(ids), SAMPLE_TOKENS)).astype(np.int64)
    sample = ids[evenly][:, list(rows)]
    sample = np.ascontiguousarray(sample[routed_T(sample)])
    if len(sample) < FEWEST_TOKENS or sample[0].size < FEWEST_CHOICES:
        return None
    whole = np.dtype((np.void, sample.itemsize * sample[0].size))
    _, first, count = np.unique(
        sample.reshape(len(sample), -1).view(whole), return_index=True, return_counts=True
    )
    if count.max() < MANY * len(sample):
        return None
    route, tokens, earliest = sample[first[count.argmax()]], 0, -1
    for at in range(0, len(ids), SAMPLE_TOKENS):
        same_T = takes_T(ids[at : at + SAMPLE_TOKENS][:, list(rows)], route)
        if earliest < 0 and same_T.any():
            earliest = at + int(same_T.argmax())
        tokens += int(same_T.sum())
    return Repeated(route, tokens, earliest)


def takes_T(ids: Ids, route: Ids) -> Ids:
    """[t] tokens that take this route."""
    same_T: Ids = (ids == route).all(axis=(1, 2))
    return same_T
