"""Routing as found in a file, cleaned into a trace; what cannot be is refused or left out, said.

Engines hand over rows for dense layers (zeros), -1 where a token has fewer choices or is padding,
experts that compute nothing (ids beyond the last real one), rows of warm-up passes. Works in blocks
of tokens, so that a file larger than memory can be cleaned. Knows arrays. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ....errors import InputError
from ...model_config.layer_ranges import written
from ...trace import PER_TOKEN, RoutingTrace, checked_k, id_dtype
from ..asked import ID_AXES, LOAD_AXES, Asked
from .found_routes import FoundRoutes, Ids, routed_T
from .repeated_routes import repeated_route, takes_T
from .route_survey import survey_routes

MOST_LAYERS = 1_000          # a second axis beyond this is none of layers


@dataclass(frozen=True, eq=False)
class CleanRoutes:
    """Cleaned routing, handed out whole or block by block."""

    found: FoundRoutes
    num_experts: int
    rows: tuple[int, ...]
    layers: tuple[int, ...]
    top_k: int
    num_tokens: int                 # that are kept
    gaps: bool                      # choices that do not count stand among others
    ragged: bool                    # tokens differ in how many choices count
    dropped: Ids | None = None      # [L, K] a route whose tokens are left out
    notes: tuple[str, ...] = ()

    def whole(self) -> RoutingTrace:
        """The trace, in memory."""
        ids = np.empty((self.num_tokens, len(self.rows), self.top_k), id_dtype(self.num_experts))
        k_TL = np.empty(ids.shape[:2], np.uint8) if self.ragged else None
        given = self.found.columns.get("gates")
        gates = None if given is None else np.empty(ids.shape, np.asarray(given[:1]).dtype)
        kept_T = np.empty(len(self.found.ids_TRK), bool)
        at = 0
        for tokens, kept, part, part_k, part_gates in self._blocks():
            kept_T[tokens] = kept
            ids[at : at + len(part)] = part
            if k_TL is not None:
                k_TL[at : at + len(part)] = part_k
            if gates is not None:
                gates[at : at + len(part)] = part_gates
            at += len(part)
        return self._trace(slice(None), kept_T, ids, k_TL, gates)

    def blocks(self) -> Iterator[RoutingTrace]:
        """Traces of at most BLOCK_TOKENS tokens each, in order."""
        for tokens, kept, ids, k_TL, gates in self._blocks():
            if len(ids):
                yield self._trace(tokens, kept, ids, k_TL if self.ragged else None, gates)

    def _trace(
        self, tokens: slice, kept_T: Ids, ids: Ids, k_TL: Ids | None, gates: Ids | None
    ) -> RoutingTrace:
        columns = {
            name: np.asarray(column)[tokens] if kept_T.all() else np.asarray(column)[tokens][kept_T]
            for name, column in self.found.columns.items()
            if column is not None and name not in ("gates", "k_of_token")
        }
        return RoutingTrace.from_arrays(
            ids, num_experts=self.num_experts, k_of_token=k_TL, gates=gates,
            domain_names=self.found.domain_names, layer_indices=self.layers,
            model_name=self.found.model_name, **columns,
        )

    def _blocks(self) -> Iterator[tuple[slice, Ids, Ids, Any, Any]]:
        """(tokens, which are kept; their ids, how many count, gates), choices that count first."""
        given = self.found.columns.get("gates")
        for tokens, every in self.found.blocks(self.rows):
            kept_T = self._kept_T(every)
            ids = every if kept_T.all() else every[kept_T]
            gates = None
            if given is not None:
                gates = np.asarray(given[tokens])[:, list(self.rows)][kept_T]
            k_TL = None
            if self.gaps:
                counts = (ids >= 0) & (ids < self.num_experts)
                order = np.argsort(~counts, axis=2, kind="stable")[:, :, : self.top_k]
                k_TL = counts.sum(axis=2).astype(np.uint8)
                ids = np.take_along_axis(np.where(counts, ids, 0), order, axis=2)
                if gates is not None:
                    gates = np.take_along_axis(np.where(counts, gates, 0), order, axis=2)
            yield tokens, kept_T, ids, k_TL, gates

    def _kept_T(self, ids: Ids) -> Ids:
        kept_T = routed_T(ids)
        return kept_T if self.dropped is None else kept_T & ~takes_T(ids, self.dropped)


def clean_routes(found: FoundRoutes, asked: Asked) -> CleanRoutes:
    """Check every choice and decide what is left out. Raises InputError naming token and layer."""
    found = _oriented(found, asked)
    _check_columns(found)
    experts = _num_experts(found, asked)
    rows, layers, notes = _moe_rows(found, asked)
    survey = survey_routes(found, rows, layers, experts, _zero_experts(found, asked, experts))
    ragged = survey.least_k < survey.top_k
    clean = CleanRoutes(
        found, experts, rows, layers, survey.top_k, survey.kept,
        ragged or survey.top_k < found.ids_TRK.shape[2], ragged,
        notes=(*notes, *survey.notes(told_zero=asked.zero_experts is not None)),
    )
    return _without_repeated(clean, asked)


def _without_repeated(clean: CleanRoutes, asked: Asked) -> CleanRoutes:
    """A note on one route in many tokens; without those tokens where that was asked."""
    many = repeated_route(clean.found, clean.rows)
    if many is None:
        return clean
    told = (
        f"one route in {many.tokens / clean.num_tokens:.1%} of the tokens ({many.tokens:,} of "
        f"{clean.num_tokens:,}, first token {many.first})"
    )
    if not asked.drop_repeated:
        note = (f"warning: {told}: warm-up or padding? --drop-repeated leaves them out "
                "(`loadmaster trace import`)")
        return replace(clean, notes=(*clean.notes, note))
    if many.tokens == clean.num_tokens:
        raise InputError(f"{told}: nothing is left without them (--drop-repeated)")
    return replace(
        clean, dropped=many.route, num_tokens=clean.num_tokens - many.tokens,
        notes=(*clean.notes, f"{told}: left out"),
    )


# ---- axes, columns, number of experts ---------------------------------------------------------


def _oriented(found: FoundRoutes, asked: Asked) -> FoundRoutes:
    """With tokens as the first axis."""
    ids = found.ids_TRK
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise InputError(f"ids must be integers [T, L, K]; got {ids.dtype} {list(ids.shape)}")
    if asked.axes in LOAD_AXES:
        raise InputError(f"--axes {asked.axes} is for loads; these are choices of tokens")
    if asked.axes is None and ids.shape[1] > MOST_LAYERS >= ids.shape[0]:
        raise InputError(
            f"ids {list(ids.shape)} look like [layers, tokens, top-k]: say --axes LTK if they "
            "are, --axes TLK if not"
        )
    if asked.axes == ID_AXES[1]:
        ids = ids.transpose(1, 0, 2)
    if not len(ids):
        raise InputError("holds no tokens: save it again, while traffic runs")
    if 0 in ids.shape:
        raise InputError(f"ids {list(ids.shape)} hold no layer or no choice")
    return FoundRoutes(ids, found.columns, found.numbers, found.num_experts, found.domain_names,
                       found.model_name)


def _check_columns(found: FoundRoutes) -> None:
    """Columns as long as there are tokens: their values are checked with the trace."""
    tokens, rows, top_k = found.ids_TRK.shape
    for name, column in found.columns.items():
        if column is None:
            continue
        shape = {"gates": (tokens, rows, top_k), "k_of_token": (tokens, rows)}.get(name, (tokens,))
        if name == "k_of_token":
            checked_k(np.asarray(column), found.ids_TRK.shape)
        elif name in PER_TOKEN and np.shape(column) != shape:
            raise InputError(f"{name} has shape {list(np.shape(column))}, must be {list(shape)}")
        if name == "gates" and np.asarray(column[:1]).dtype.kind not in "fiu":
            raise InputError(f"gates must be numbers; got {column.dtype}: leave them out")


def _num_experts(found: FoundRoutes, asked: Asked) -> int:
    experts = asked.experts(found.num_experts)
    if experts is None:
        shape, top = list(found.ids_TRK.shape), int(found.ids_TRK.max())
        if top > shape[0]:
            raise InputError(
                f"numbers {shape} up to {top:,} in {shape[0]} rows look like loads: say --axes WLE "
                "(windows, layers, experts); ids of experts need --num-experts"
            )
        raise InputError(
            "does not say how many experts a layer has, and the largest id need not be the last "
            f"expert: give --num-experts; its ids {shape} go up to {top}"
        )
    return experts


def _zero_experts(found: FoundRoutes, asked: Asked, experts: int) -> int:
    """How many ids beyond the experts stand for experts that compute nothing."""
    if asked.zero_experts is not None:
        return asked.zero_experts
    beyond = int(found.ids_TRK.max()) - experts + 1
    return beyond if found.num_experts is not None and 0 < beyond < experts else 0


# ---- which rows are MoE layers ----------------------------------------------------------------


def _moe_rows(
    found: FoundRoutes, asked: Asked
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """(rows, their layer numbers, notes): by the model, else all that route possibly."""
    count, top_k = found.ids_TRK.shape[1:]
    told = asked.layer_rows(count, found.numbers)
    used_R, zeros_R, twice_R = np.zeros(count, bool), np.ones(count, bool), np.zeros(count, bool)
    for _, every in found.blocks():
        doubtful = np.flatnonzero(zeros_R)      # few after the first block
        ids = every[:, doubtful]
        used_R[doubtful] |= (ids >= 0).any(axis=(0, 2))
        twice_R[doubtful] |= ((ids == 0).sum(axis=2) > 1).any(axis=0)
        zeros_R[doubtful] &= (ids <= 0).all(axis=(0, 2))
        if not zeros_R.any():
            break
    rows = tuple(range(count)) if told is None else told.rows
    layers = rows if told is None else told.layers
    notes = () if told is None else told.notes
    dead_R = zeros_R & (twice_R | ~used_R)
    alive = [row for row in range(count) if row not in rows and not zeros_R[row]]
    if alive:
        raise InputError(
            f"row {alive[0]} routes tokens, but {asked.model.name if asked.model else 'it'} has no "
            "MoE layer there: another model, or number the rows by --layers"
        )
    if top_k == 1 and zeros_R[list(rows)].any() and asked.model is None:
        which = written([layers[i] for i, row in enumerate(rows) if zeros_R[row]])
        notes += (f"every token chose expert 0 in layer {which}: dense layers? --model tells",)
    dead = [layer for row, layer in zip(rows, layers, strict=True) if dead_R[row]]
    if len(dead) == len(rows):
        raise InputError("no layer routes: every id is 0 or -1: save it again, while traffic runs")
    if dead:
        why = "zeros or nothing for every token, which no router says"
        what = ("MoE layers of the model, so not recorded" if asked.model is not None
                else "taken as dense, left out")
        notes += (f"layers {written(dead)} hold {why}: {what}",)
    kept = [(row, layer) for row, layer in zip(rows, layers, strict=True) if not dead_R[row]]
    return tuple(row for row, _ in kept), tuple(layer for _, layer in kept), notes
