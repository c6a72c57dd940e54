"""Putting traces together: the ranks of one recording, or several recordings of one model.

Knows traces in memory. Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .trace import RoutingTrace

# Domain 0 of a recording: tokens that came without a label, so that indices never shift.
UNLABELLED = "unlabelled"


def concatenate(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace with the tokens of all, in the order given; traces without tokens add nothing.

    Keeps the per-token columns that every one of them has. Domains are joined by name. Requests
    keep their numbers: the same number in two traces means the same request.
    Raises InputError on none at all, or on traces of different models.
    """
    if not traces:
        raise InputError("no trace to put together: give at least one")
    filled = [t for t in traces if t.num_tokens] or [traces[0]]
    first = filled[0]
    for other in filled[1:]:
        if _shape(other) != _shape(first) or other.layer_indices != first.layer_indices:
            raise InputError(
                f"traces with (L, K, E) = {_shape(first)} and {_shape(other)} do not go together: "
                "one trace holds one model"
            )
    if len(filled) == 1:
        return first
    names = tuple(dict.fromkeys(n for t in filled for n in t.domain_names))
    columns: dict[str, Any] = {}
    for column in ("gates", "k_of_token", "step", "request", "source", "phase", "domain"):
        pieces: list[Any] = [
            _renumbered(t, names) if column == "domain" else getattr(t, column) for t in filled
        ]
        columns[column] = None if any(p is None for p in pieces) else np.concatenate(pieces)
    ids = np.concatenate([t.ids.transpose(1, 0, 2) for t in filled], axis=1).transpose(1, 0, 2)
    return dataclasses.replace(
        first, ids=ids, domain_names=names if columns["domain"] is not None else (), **columns
    )


def in_step_order(trace: RoutingTrace) -> RoutingTrace:
    """The same tokens by recorded step; inside a step they keep their order."""
    if trace.step is None or (np.diff(trace.step) >= 0).all():
        return trace
    return trace.select(np.argsort(trace.step, kind="stable"))


def without_unlabelled(trace: RoutingTrace) -> RoutingTrace:
    """A recording as a trace: the name for tokens without a label goes where no token has it.

    Where no token has a label, the trace has no domains.
    """
    if trace.domain is None or trace.domain_names[:1] != (UNLABELLED,):
        return trace
    if not trace.domain.any():
        return dataclasses.replace(trace, domain=None, domain_names=())
    if (trace.domain == 0).any():
        return trace
    return dataclasses.replace(
        trace, domain=trace.domain - 1, domain_names=trace.domain_names[1:]
    )


def _shape(trace: RoutingTrace) -> tuple[int, int, int]:
    return trace.num_layers, trace.top_k, trace.num_experts


def _renumbered(trace: RoutingTrace, names: tuple[str, ...]) -> npt.NDArray[np.int32] | None:
    """The domain column as indices into `names`."""
    if trace.domain is None:
        return None
    place = np.array([names.index(n) for n in trace.domain_names], np.int32)
    return place[trace.domain]
