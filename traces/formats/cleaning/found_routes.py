"""Routing as a file holds it, before anything is decided about it, read block by block.

Knows arrays. Knows nothing of files, or of what is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK_TOKENS = 65_536
PADDING = -1

Ids = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class FoundRoutes:
    """Routing as a file holds it. Rows are layers, of whatever kind."""

    ids_TRK: Ids                                   # may be a mapped file
    columns: Mapping[str, Any] = field(default_factory=dict)    # per token, by RoutingTrace's names
    numbers: tuple[int, ...] | None = None         # of the rows, where the file says them
    num_experts: int | None = None                 # as the file says
    domain_names: tuple[str, ...] = ()
    model_name: str = ""

    @property
    def tells_k(self) -> bool:
        """Whether the file itself says how many choices of each token count."""
        return self.columns.get("k_of_token") is not None

    def blocks(self, rows: tuple[int, ...] | None = None) -> Iterator[tuple[slice, Ids]]:
        """Which tokens, and their ids [t, R, K] in those rows, PADDING where k_of_token says that
        a choice does not count.
        """
        for start in range(0, len(self.ids_TRK), BLOCK_TOKENS):
            tokens = slice(start, min(start + BLOCK_TOKENS, len(self.ids_TRK)))
            ids = self._choices(tokens)
            whole = rows is None or len(rows) == ids.shape[1]
            yield tokens, ids if whole else ids[:, list(rows or ())]

    def _choices(self, tokens: slice) -> Ids:
        ids = np.asarray(self.ids_TRK[tokens])
        if not self.tells_k:
            return ids
        k_TR = np.asarray(self.columns["k_of_token"])[tokens]
        wide = np.minimum(ids, np.iinfo(np.int64).max).astype(np.int64)
        return np.where(np.arange(ids.shape[2]) < k_TR[:, :, None], wide, PADDING)


def routed_T(ids: Ids) -> npt.NDArray[np.bool_]:
    """[t] tokens that are no padding: some choice is there, and not zeros in every layer."""
    kept: npt.NDArray[np.bool_] = ~zeros_T(ids)
    if ids.dtype.kind == "i" and ids.min(initial=0) < 0:
        kept &= (ids >= 0).any(axis=(1, 2))
    return kept


def zeros_T(ids: Ids) -> npt.NDArray[np.bool_]:
    """[t] tokens of zeros alone: a router would have to choose expert 0 twice in each layer."""
    found = np.zeros(len(ids), bool)
    if ids.shape[2] > 1:
        doubtful = np.flatnonzero((ids[:, 0, 0] == 0) & (ids[:, 0, 1] == 0))
        part = ids[doubtful]
        found[doubtful] = (part[:, :, :2] == 0).all(axis=(1, 2)) & (part <= 0).all(axis=(1, 2))
    return found
