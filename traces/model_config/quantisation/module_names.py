"""Whether a pattern of a quantiser names a layer's routed experts.

Quantisers say which modules they touch, or leave alone, in one another's manners: a module's name,
the beginning or an inner part of one ("experts"), a glob ("model.layers.0*"), a regular expression
("re:.*self_attn.*"). Knows names. Knows nothing of formats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

# The same matrix under the names that models give it; the last is the way out of the expert.
MATRICES: tuple[tuple[str, ...], ...] = (
    ("gate_proj", "w1", "gate_up_proj"), ("up_proj", "w3", "gate_up_proj"), ("down_proj", "w2"),
)
_BEFORE = ("model.", "", "language_model.model.", "model.language_model.", "backbone.")
_LAYER = re.compile(r"(^|.*\.)(layers|h|blocks)\.")
DRAFT = re.compile(r"mtp|nextn|draft|eagle")
ELSEWHERE = re.compile(r"visi|visual|vit|audio|tower|encoder|talker")     # not the language model
_CLASS = re.compile(r"[A-Z]\w*")
_REGULAR = re.compile(r"[\\^$()|]")


@dataclass(frozen=True)
class Matrix:
    """One matrix of one layer's experts, in a model whose blocks are called so."""

    layer: int
    which: int                     # gate 0, up 1, down 2
    expert: int
    blocks: tuple[str, ...]
    draft: bool = False            # of an MTP layer: also called mtp.layers.0, mtp.0

    def names(self) -> tuple[str, ...]:
        """What the matrix may be called, from the number of its layer on."""
        return tuple(
            f"{block + '.' if block else ''}experts.{self.expert}.{name}"
            for block in self.blocks for name in MATRICES[self.which]
        )


def names_matrix(pattern: str, matrix: Matrix) -> bool:
    """Whether the pattern means this matrix: by its name, or by what it is a part of."""
    if pattern.startswith("re:"):
        return _by_regular_expression(pattern.removeprefix("re:"), matrix)
    if _REGULAR.search(pattern) or pattern.startswith(".*"):
        return _by_regular_expression(pattern, matrix)
    if "*" in pattern or "?" in pattern:
        return _by_glob(pattern, matrix)
    if _CLASS.fullmatch(pattern):
        return pattern == "Linear" or re.search(r"Expert|Mo[eE](Block)?$", pattern) is not None
    return _by_part(pattern, matrix)


def _by_part(pattern: str, matrix: Matrix) -> bool:
    """A whole name, its beginning, or whole words inside it."""
    place, rest = _placed(pattern)
    if place is None:
        if DRAFT.search(pattern) or ELSEWHERE.search(pattern):
            return matrix.draft and re.fullmatch(r"(model\.)?mtp(\.\d+)?", pattern) is not None
        inside = f".{pattern}."
        return any(inside in f".layers.{matrix.layer}.{name}." for name in matrix.names())
    number, _, tail = rest.partition(".")
    if matrix.draft and "mtp" in place:
        number = str(matrix.layer)          # counted from the first draft layer there
    elif DRAFT.search(place) or ELSEWHERE.search(place):
        return False
    if number != str(matrix.layer):
        return False
    return not tail or any(
        name == tail or name.startswith(f"{tail}.") for name in matrix.names()
    )


def _by_glob(pattern: str, matrix: Matrix) -> bool:
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in _whole(matrix)
    )


def _by_regular_expression(pattern: str, matrix: Matrix) -> bool:
    compiled = _compiled(pattern)
    return compiled is not None and any(compiled.match(name) for name in _whole(matrix))


@cache
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


@cache
def _whole(matrix: Matrix) -> tuple[str, ...]:
    """The matrix's whole names, under everything that may stand before its layer."""
    before = tuple(f"{start}layers.{matrix.layer}." for start in _BEFORE)
    if matrix.draft:
        before += tuple(f"mtp.{middle}{i}." for middle in ("", "layers.") for i in range(2))
    return tuple(start + name for start in before for name in matrix.names())


def _placed(pattern: str) -> tuple[str | None, str]:
    """What stands before the layer's number in a name, and from the number on."""
    found = _LAYER.match(pattern)
    if found is None:
        return None, pattern
    return found[1], pattern[found.end():]


def layer_of(pattern: str) -> int | None:
    """The one layer that a name or glob is about; None where it may be about several."""
    if pattern.startswith("re:") or _REGULAR.search(pattern):
        return None
    place, rest = _placed(pattern)
    number, dot, _ = rest.partition(".")
    whole = dot or not {"*", "?"} & set(pattern)
    return int(number) if place is not None and number.isdigit() and whole else None
