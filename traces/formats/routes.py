"""Routing as found in a file, cleaned into a trace; what cannot be is refused or left out, said.

Engines hand over rows for dense layers (zeros), -1 where a token has fewer choices or is padding,
experts that compute nothing (ids beyond the last real one), rows of warm-up passes. Works in blocks
of tokens, so that a file larger than memory can be cleaned. Knows arrays. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..model_config.layer_ranges import written
from ..trace import PER_TOKEN, RoutingTrace, checked_k, id_dtype
from .asked import ID_AXES, LOAD_AXES, Asked

BLOCK_TOKENS = 65_536
PADDING = -1
MANY_REPEATED = 0.2          # of the tokens on one route: then warm-up or padding is suspected
SAMPLE_TOKENS = 65_536       # in which a repeated route is looked for
MOST_LAYERS = 1_000          # a second axis beyond this is none of layers

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


@dataclass(frozen=True, eq=False)
class CleanRoutes:
    """Cleaned routing, handed out whole or block by block."""

    found: FoundRoutes
    num_experts: int
    rows: tuple[int, ...]
    layers: tuple[int, ...]
    top_k: int
    kept_T: npt.NDArray[np.bool_] | None           # None: all tokens
    gaps: bool                                     # choices that do not count stand among others
    ragged: bool                                   # tokens differ in how many choices count
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.found.ids_TRK) if self.kept_T is None else int(self.kept_T.sum())

    def whole(self) -> RoutingTrace:
        """The trace, in memory."""
        ids = np.empty((self.num_tokens, len(self.rows), self.top_k), id_dtype(self.num_experts))
        k_TL = np.empty(ids.shape[:2], np.uint8) if self.ragged else None
        given = self.found.columns.get("gates")
        gates = None if given is None else np.empty(ids.shape, np.asarray(given[:1]).dtype)
        at = 0
        for tokens in self._ranges():
            part, part_k, part_gates = self._block(tokens)
            ids[at : at + len(part)] = part
            if k_TL is not None:
                k_TL[at : at + len(part)] = part_k
            if gates is not None:
                gates[at : at + len(part)] = part_gates
            at += len(part)
        return self._trace(slice(None), ids, k_TL, gates)

    def blocks(self) -> Iterator[RoutingTrace]:
        """Traces of at most BLOCK_TOKENS tokens each, in order."""
        for tokens in self._ranges():
            ids, k_TL, gates = self._block(tokens)
            if len(ids):
                yield self._trace(tokens, ids, k_TL if self.ragged else None, gates)

    def _trace(self, tokens: slice, ids: Ids, k_TL: Any, gates: Any) -> RoutingTrace:
        kept = None if self.kept_T is None else self.kept_T[tokens]
        columns = {
            name: np.asarray(column)[tokens] if kept is None else np.asarray(column)[tokens][kept]
            for name, column in self.found.columns.items()
            if column is not None and name not in ("gates", "k_of_token")
        }
        return RoutingTrace.from_arrays(
            ids, num_experts=self.num_experts, k_of_token=k_TL, gates=gates,
            domain_names=self.found.domain_names, layer_indices=self.layers,
            model_name=self.found.model_name, **columns,
        )

    def _ranges(self) -> Iterator[slice]:
        for start in range(0, len(self.found.ids_TRK), BLOCK_TOKENS):
            yield slice(start, min(start + BLOCK_TOKENS, len(self.found.ids_TRK)))

    def _block(self, tokens: slice) -> tuple[Ids, Any, Any]:
        """(ids, how many count, gates) of kept tokens and rows, choices that count first."""
        ids = _choices(self.found, tokens)[:, list(self.rows)]
        gates = self.found.columns.get("gates")
        if gates is not None:
            gates = np.asarray(gates[tokens])[:, list(self.rows)]
        if self.kept_T is not None:
            ids = ids[self.kept_T[tokens]]
            gates = None if gates is None else gates[self.kept_T[tokens]]
        if not self.gaps:
            return ids, None, gates
        counts = (ids >= 0) & (ids < self.num_experts)
        order = np.argsort(~counts, axis=2, kind="stable")[:, :, : self.top_k]
        k_TL = counts.sum(axis=2).astype(np.uint8)
        ids = np.take_along_axis(np.where(counts, ids, 0), order, axis=2)
        if gates is not None:
            gates = np.take_along_axis(np.where(counts, gates, 0), order, axis=2)
        return ids, k_TL, gates


def clean_routes(found: FoundRoutes, asked: Asked) -> CleanRoutes:
    """Check every choice and decide what is left out. Raises InputError naming token and layer."""
    found = _oriented(found, asked)
    _check_columns(found)
    experts = _num_experts(found, asked)
    rows, layers, notes = _moe_rows(found, asked)
    survey = _survey(found, rows, layers, experts, _zero_experts(found, asked, experts))
    kept_T = survey.kept_T
    if not kept_T.any():
        raise InputError("no token is routed in any layer: save it again, while traffic runs")
    notes += survey.notes(asked)
    clean = CleanRoutes(
        found, experts, rows, layers, survey.top_k, None if kept_T.all() else kept_T,
        survey.top_k < found.ids_TRK.shape[2] or survey.least_k < survey.top_k,
        survey.least_k < survey.top_k, notes,
    )
    return _without_repeated(clean, asked)


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
            f"expert: give --num-experts (num_experts); its ids {shape} go up to {top}"
        )
    return experts


def _zero_experts(found: FoundRoutes, asked: Asked, experts: int) -> int:
    """How many ids beyond the experts stand for experts that compute nothing."""
    if asked.zero_experts is not None:
        return asked.zero_experts
    beyond = int(found.ids_TRK.max()) - experts + 1
    return beyond if found.num_experts is not None and 0 < beyond < experts else 0


# ---- which rows are MoE layers ----------------------------------------------------------------


def _choices(found: FoundRoutes, tokens: slice) -> Ids:
    """[t, R, K] ids, PADDING where k_of_token says that a choice does not count."""
    ids = np.asarray(found.ids_TRK[tokens])
    if ids.dtype == np.uint64:
        ids = np.minimum(ids, np.iinfo(np.int64).max)
    ids = ids.astype(np.int64, copy=False)
    k_of_token = found.columns.get("k_of_token")
    if k_of_token is not None:
        k_TR = np.asarray(k_of_token)[tokens]
        ids = np.where(np.arange(ids.shape[2]) < k_TR[:, :, None], ids, PADDING)
    return ids


def _all(found: FoundRoutes) -> Iterator[tuple[slice, Ids]]:
    for start in range(0, len(found.ids_TRK), BLOCK_TOKENS):
        tokens = slice(start, min(start + BLOCK_TOKENS, len(found.ids_TRK)))
        yield tokens, _choices(found, tokens)


def _moe_rows(
    found: FoundRoutes, asked: Asked
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """(rows, their layer numbers, notes): by the model, else all that route possibly."""
    count, top_k = found.ids_TRK.shape[1:]
    told = asked.layer_rows(count, found.numbers)
    used_R, zeros_R, twice_R = np.zeros(count, bool), np.ones(count, bool), np.zeros(count, bool)
    for _, ids in _all(found):
        used_R |= (ids >= 0).any(axis=(0, 2))
        zeros_R &= (ids <= 0).all(axis=(0, 2))
        twice_R |= ((ids == 0).sum(axis=2) > 1).any(axis=0)
    rows = tuple(range(count)) if told is None else told.rows
    layers = rows if told is None else told.layers
    notes = () if told is None else told.notes
    dead_R = ~used_R | (zeros_R & twice_R)
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


# ---- every choice -----------------------------------------------------------------------------


@dataclass
class _Survey:
    """What the kept rows hold."""

    kept_T: npt.NDArray[np.bool_]
    top_k: int = 0
    least_k: int = 65_536
    most_there: int = 0      # choices of a token in a layer, of any kind
    zero_choices: int = 0    # of experts that compute nothing
    choices: int = 0
    zero_tokens: int = 0     # zeros in every layer
    empty_tokens: int = 0
    experts: int = 0
    beyond: int = 0
    cells: int = 0           # of kept tokens and rows
    told_k: bool = False     # the file itself says how many choices count

    @property
    def padded(self) -> int:
        """Choices that tokens lack, where others have them."""
        return self.cells * self.most_there - self.choices

    def notes(self, asked: Asked) -> tuple[str, ...]:
        said = []
        for count, what in (
            (self.empty_tokens, "no choice in any layer: padding"),
            (self.zero_tokens, "zeros in every layer, which no router says: padding"),
        ):
            if count:
                said.append(f"{count:,} of {len(self.kept_T):,} tokens hold {what}, left out")
        if self.padded and not self.told_k:
            said.append(f"{self.padded:,} choices of other tokens are -1: not counted")
        if self.zero_choices:
            last = self.experts + self.beyond - 1
            doubt = "" if asked.zero_experts is not None else (
                "; were they slots of replicas, map them to experts first (--zero-experts 0 "
                "refuses them)"
            )
            said.append(
                f"{self.zero_choices / self.choices:.1%} of the choices are ids {self.experts} to "
                f"{last}, beyond the {self.experts} experts: taken for zero-computation experts, "
                f"which never leave the rank, and counted apart{doubt}"
            )
        return tuple(said)


def _survey(
    found: FoundRoutes, rows: tuple[int, ...], layers: tuple[int, ...], experts: int, zero: int
) -> _Survey:
    """Raises InputError on the first choice that cannot be."""
    out = _Survey(np.ones(len(found.ids_TRK), bool), experts=experts, beyond=zero,
                  told_k=found.columns.get("k_of_token") is not None)
    for tokens, every in _all(found):
        ids = every[:, list(rows)]
        _refuse_strange(ids, found, experts, zero, tokens.start, layers)
        there = ids >= 0
        real = there & (ids < experts)
        empty_T = ~there.any(axis=(1, 2))
        # Zeros in all layers: a router would have to choose expert 0 twice in each.
        zeros_T = (ids[:, :, :2] == 0).all(axis=(1, 2)) & (ids <= 0).all(axis=(1, 2))
        zeros_T &= ids.shape[2] > 1
        kept_T = ~(empty_T | zeros_T)
        _refuse_twice(ids, there, kept_T, tokens.start, layers)
        k_TL, there_TL = real.sum(axis=2)[kept_T], there.sum(axis=2)[kept_T]
        out.kept_T[tokens] = kept_T
        out.top_k = max(out.top_k, int(k_TL.max(initial=0)))
        out.least_k = min(out.least_k, int(k_TL.min(initial=out.least_k)))
        out.most_there = max(out.most_there, int(there_TL.max(initial=0)))
        out.empty_tokens += int(empty_T.sum())
        out.zero_tokens += int(zeros_T.sum())
        out.cells += k_TL.size
        out.choices += int(there_TL.sum())
        out.zero_choices += int(there_TL.sum() - k_TL.sum())
    if out.kept_T.any() and not out.top_k:
        raise InputError(f"no choice is one of the {experts} experts: check --num-experts")
    return out


def _refuse_strange(
    ids: Ids, found: FoundRoutes, experts: int, zero: int, start: int, layers: tuple[int, ...]
) -> None:
    most = int((ids >= 0).sum(axis=2).max(initial=0))
    if most > experts + zero:
        raise InputError(
            f"each token chooses K={most} experts but a layer has only E={experts}: check "
            "--num-experts, or the axes (--axes WLE for loads)"
        )
    strange = (ids < PADDING) | (ids >= experts + zero)
    if not strange.any():
        return
    t, layer, _ = np.argwhere(strange)[0]
    top = int(found.ids_TRK.max())
    raise InputError(
        f"token {start + t}, layer {layers[layer]}: expert ids {ids[t, layer].tolist()} are not "
        f"all in [0, {experts}): wrong --num-experts, or physical slots recorded as experts, or "
        f"loads (--axes WLE), or zero-computation experts (--zero-experts {top - experts + 1})"
    )


def _refuse_twice(
    ids: Ids, there: Ids, kept_T: Ids, start: int, layers: tuple[int, ...]
) -> None:
    """An expert twice in a token's choice cannot be."""
    for a in range(ids.shape[2]):
        for b in range(a + 1, ids.shape[2]):
            same = (ids[:, :, a] == ids[:, :, b]) & there[:, :, a] & kept_T[:, None]
            if same.any():
                t, layer = np.argwhere(same)[0]
                raise InputError(
                    f"token {start + t}, layer {layers[layer]}: expert {ids[t, layer, a]} twice in "
                    f"one choice {ids[t, layer].tolist()}, which no router makes: record it again, "
                    "or check the axes (--axes) and the rows (--layers)"
                )


# ---- warm-up and dummy passes -----------------------------------------------------------------


def _without_repeated(clean: CleanRoutes, asked: Asked) -> CleanRoutes:
    """A note on one route in many tokens; without those tokens where that was asked."""
    ids, rows = clean.found.ids_TRK, list(clean.rows)
    kept = np.flatnonzero(clean.kept_T) if clean.kept_T is not None else np.arange(len(ids))
    picked = kept[np.unique(np.linspace(0, len(kept) - 1, SAMPLE_TOKENS).astype(np.int64))]
    if len(picked) < 8 or len(rows) * ids.shape[2] < 4:
        return clean
    sample = np.ascontiguousarray(ids[picked][:, rows]).reshape(len(picked), -1)
    whole = np.dtype((np.void, sample.itemsize * sample.shape[1]))
    _, first, count = np.unique(sample.view(whole), return_index=True, return_counts=True)
    if count.max() < MANY_REPEATED * len(picked):
        return clean
    route = sample[first[count.argmax()]].reshape(len(rows), -1)
    same_T = np.zeros(len(ids), bool)
    for start in range(0, len(ids), BLOCK_TOKENS):
        tokens = slice(start, start + BLOCK_TOKENS)
        same_T[tokens] = (ids[tokens][:, rows] == route).all(axis=(1, 2))
    if clean.kept_T is not None:
        same_T &= clean.kept_T
    total, share = clean.num_tokens, int(same_T.sum()) / clean.num_tokens
    said = (
        f"one route in {share:.1%} of the tokens ({int(same_T.sum()):,} of {total:,}, first token "
        f"{int(same_T.argmax())})"
    )
    if not asked.drop_repeated:
        note = (f"warning: {said}: warm-up or padding? `loadmaster trace import --drop-repeated` "
                "leaves them out")
        return _with(clean, clean.kept_T, note)
    rest = ~same_T if clean.kept_T is None else clean.kept_T & ~same_T
    if not rest.any():
        raise InputError(f"{said}: nothing is left without them (--drop-repeated)")
    return _with(clean, rest, f"{said}: left out")


def _with(clean: CleanRoutes, kept_T: Any, note: str) -> CleanRoutes:
    return CleanRoutes(clean.found, clean.num_experts, clean.rows, clean.layers, clean.top_k,
                       kept_T, clean.gaps, clean.ragged, (*clean.notes, note))
