"""Counts that ranks wrote, one file each: found by their names, summed, and said.

A balancer on each rank counts its own tokens, so a plan from one rank's file is a plan for that
rank. Knows names and sums.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from ....errors import InputError
from ..result import ImportResult

_RANK = re.compile(r"(?P<before>.*?rank[-_ ]?)(?P<rank>\d+)(?P<after>.*)", re.IGNORECASE)


def rank_files(path: Path) -> list[Path]:
    """`path` and the files beside it that are named alike but for the number of the rank."""
    match = _RANK.fullmatch(path.name)
    if match is None:
        return [path]
    beside = [
        (int(m["rank"]), other) for other in path.parent.iterdir()
        if (m := _RANK.fullmatch(other.name)) and other.is_file()
        and (m["before"], m["after"]) == (match["before"], match["after"])
    ]
    return [other for _, other in sorted(beside)]


def rank_notes(path: Path, files: list[Path]) -> tuple[str, ...]:
    """Whose counts were summed; a warning where a rank's file lies alone."""
    if len(files) > 1:
        shown = ", ".join(file.name for file in files[:4]) + (", …" if len(files) > 4 else "")
        return (f"counts of {len(files)} ranks summed: {shown}",)
    match = _RANK.fullmatch(path.name)
    if match is None:
        return ()
    return (
        f"warning: by its name these are rank {int(match['rank'])}'s counts alone, and no other "
        "rank's file lies beside it: put them there to sum all",
    )


def with_ranks(
    found: ImportResult, path: Path, files: list[Path], others: list[ImportResult]
) -> ImportResult:
    """One rank's loads with those of the others. Raises InputError on other shapes or layers."""
    profile = found.profile
    assert profile is not None
    total = profile.load_WLE
    for other in others:
        held = other.profile
        if held is None or held.load_WLE.shape != total.shape or (
            held.layer_indices != profile.layer_indices
        ):
            raise InputError(
                f"the ranks' files beside it hold loads of other shapes or layers than "
                f"{list(total.shape)}: move {path.name} to a folder of its own to read it alone"
            )
        total = np.add(total, held.load_WLE)
    return replace(
        found, profile=replace(profile, load_WLE=total),
        notes=(*rank_notes(path, files), *found.notes),
    )
