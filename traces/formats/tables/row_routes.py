"""Routing from the rows of a table: one choice a row, or one token's choice in a layer.

Rows come token by token, or layer by layer within a pass. Where no column tells tokens apart, each
run of rows of one layer is one token's choice (or, with a given top-k, so many tokens'). What is
held in memory is one pass at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import InputError
from ..asked import Asked
from ..cleaning.found_routes import PADDING, FoundRoutes
from ..cleaning.routes import clean_routes
from ..cleaning.routes_result import RoutesResult
from ..cleaning.spool import Spool
from ..result import NO_HOMES, NO_PHASE, NO_REQUESTS, NO_STEPS
from .row_columns import Columns

MOST_HELD = 1 << 20          # choices of a token in a layer, before a token must be whole
FLUSH_TOKENS = 8_192
MOST_K = 256

Rows = Iterable[tuple[str, Mapping[str, Any]]]
Key = tuple[str, str, int]   # request, token, count within a run of one layer
Group = tuple[str, Key, int, list[int]]      # place, token, layer, experts


def import_row_routes(path: Path, rows: Rows, columns: Columns, asked: Asked) -> RoutesResult:
    """A table of routes. Raises InputError naming the row, or what must be told."""
    one_a_row = "experts" in columns
    groups = _listed(rows, columns) if one_a_row else _gathered(rows, columns, asked.top_k)
    tokens = _Tokens(path)
    for group in groups:
        tokens.add(*group)
    spool = tokens.finished()
    routes = clean_routes(FoundRoutes(
        spool.ids(), spool.columns() if "request" in columns else {},
        numbers=tuple(tokens.layers or ()), model_name=path.stem,
    ), asked)
    notes = []
    if "token" not in columns:
        notes.append(
            "no column tells tokens apart: "
            + ("each row is one token's choice in a layer" if one_a_row
               else f"each {tokens.top_k} rows of one layer are one token's choice")
            + ", and a layer that is not above the one before begins the next token"
        )
    absent = (NO_STEPS, *(() if "request" in columns else (NO_REQUESTS,)), NO_HOMES, NO_PHASE)
    return RoutesResult(f"routes by row ({path.suffix})", routes, absent, tuple(notes))


def _listed(rows: Rows, columns: Columns) -> Iterator[Group]:
    """Rows that list a token's experts."""
    run = _Runs()
    for where, row in rows:
        layer = columns.whole(row, "layer", where)
        named = columns.text(row, "request"), columns.text(row, "token")
        count = 0 if "token" in columns else run.count(named, layer)
        yield where, (*named, count), layer, columns.numbers(row, "experts", where)


def _gathered(rows: Rows, columns: Columns, top_k: int | None) -> Iterator[Group]:
    """Rows of one expert each, gathered to one token's choice in a layer."""
    run, usual = _Runs(), top_k
    held: list[int] = []
    before: tuple[Any, ...] | None = None
    place = ""
    named_tokens = "token" in columns
    for where, row in rows:
        layer = columns.whole(row, "layer", where)
        now = (columns.text(row, "request"), columns.text(row, "token"), layer)
        expert = columns.whole(row, "expert", where)
        full = top_k is not None and len(held) == top_k
        if before is not None and (now != before or full):
            usual = _require_usual(held, usual, named_tokens, place)
            yield place, (*before[:2], run.count(before[:2], before[2])), before[2], held
            held = []
        if not held:
            place = where
        held.append(expert)
        if len(held) > MOST_K:
            raise InputError(
                f"{where}: more than {MOST_K} rows of layer {layer} in a row: say how many experts "
                "a token chooses with --top-k"
            )
        before = now
    if before is not None:
        _require_usual(held, usual, named_tokens, place)
        yield place, (*before[:2], run.count(before[:2], before[2])), before[2], held


def _require_usual(held: list[int], usual: int | None, named_tokens: bool, where: str) -> int:
    """Without names of tokens, every run must be as long as the first."""
    if named_tokens:
        return len(held)
    if usual is not None and len(held) != usual:
        raise InputError(
            f"{where}: {len(held)} rows of one layer, {usual} before: no column tells tokens apart "
            "(token, position), so say how many experts a token chooses with --top-k"
        )
    if len(set(held)) < len(held):
        twice = next(expert for expert in held if held.count(expert) > 1)
        raise InputError(
            f"{where}: expert {twice} twice in {len(held)} rows of one layer: these are several "
            "tokens' choices, so say how many experts a token chooses with --top-k"
        )
    return len(held)


class _Runs:
    """Counts choices within a run of one layer, where no column tells tokens apart."""

    def __init__(self) -> None:
        self._before: tuple[Any, ...] | None = None
        self._count = 0

    def count(self, named: tuple[str, str], layer: int) -> int:
        now = (named, layer)
        self._count = self._count + 1 if now == self._before else 0
        self._before = now
        return self._count


class _Tokens:
    """Gathers choices to whole tokens and passes them on to a spool."""

    def __init__(self, path: Path) -> None:
        self.layers: list[int] | None = None
        self.top_k = 0
        self._path, self._spool = path, Spool()
        self._held: dict[Key, dict[int, list[int]]] = {}
        self._choices, self._layer_before = 0, -1
        self._requests: dict[str, int] = {}

    def add(self, where: str, token: Key, layer: int, experts: list[int]) -> None:
        """One token's choice in a layer."""
        if self.top_k == 0:
            self.top_k = len(experts)
        if len(experts) > self.top_k:
            if self.layers is not None or len(experts) > MOST_K:
                raise InputError(
                    f"{where}: {len(experts)} experts, no token before chose more than {self.top_k}"
                )
            self.top_k = len(experts)
        below = not token[1] and layer < self._layer_before      # without names, a new pass
        if below or layer in self._held.get(token, ()):
            self._flush(where, whole=True)
        elif token not in self._held and len(self._held) % FLUSH_TOKENS == FLUSH_TOKENS - 1:
            self._flush(where, whole=False)
        self._layer_before = layer
        if self._choices > MOST_HELD:
            raise InputError(
                f"{where}: {len(self._held):,} tokens began and none is whole: sort the rows by "
                "token, then layer"
            )
        self._held.setdefault(token, {})[layer] = experts
        self._choices += 1

    def finished(self) -> Spool:
        """All tokens. Raises InputError where one is not whole."""
        self._flush(f"{self._path}, at the end", whole=True)
        if not self._spool.tokens:
            raise InputError(f"{self._path}: holds no row")
        return self._spool

    def _flush(self, where: str, *, whole: bool) -> None:
        """Pass on the tokens that have all layers; whole: all must."""
        if self.layers is None:
            seen = {layer for held in self._held.values() for layer in held}
            if not whole and any(len(held) < len(seen) for held in self._held.values()):
                return           # the first pass is still being read, layer by layer
            if not whole and len(seen) == 1 and self._choices < MOST_HELD:
                return           # other layers may follow
            self.layers = sorted(seen)
        done = {}
        for token, held in self._held.items():
            if set(held) == set(self.layers):
                done[token] = held
            elif whole or not set(held) <= set(self.layers):
                odd = sorted(set(held) ^ set(self.layers))[0]
                fault = "lacks" if odd in self.layers else "has"
                raise InputError(
                    f"{where}: a token {fault} layer {odd}, others have layers "
                    f"{self.layers[:8]}: every token needs a choice in every layer"
                )
        self._spool_tokens(done, where)
        for token in done:
            del self._held[token]
        self._choices -= len(done) * len(self.layers)

    def _spool_tokens(self, done: dict[Key, dict[int, list[int]]], where: str) -> None:
        assert self.layers is not None
        if not done:
            return
        ids = np.full((len(done), len(self.layers), self.top_k), PADDING, np.int64)
        for t, held in enumerate(done.values()):
            for row, layer in enumerate(self.layers):
                ids[t, row, : len(held[layer])] = held[layer]
        request = [self._requests.setdefault(key[0], len(self._requests)) for key in done]
        self._spool.add(ids, where, request=np.array(request))
