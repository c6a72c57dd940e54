"""A folder of .npy files, one per request: ids [T, L, K] each, as engines return them."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import InputError, naming
from .arrays import read_mapped
from .asked import Asked
from .cleaning.found_routes import FoundRoutes
from .cleaning.routes import clean_routes
from .cleaning.routes_result import RoutesResult
from .cleaning.spool import Spool
from .result import NO_HOMES, NO_PHASE, NO_STEPS


def import_per_request(folder: Path, asked: Asked) -> RoutesResult:
    """Files in the order of the numbers in their names. Raises InputError naming the file."""
    spool = Spool()
    files = sorted(folder.glob("*.npy"), key=_by_number)
    for request, file in enumerate(files):
        with naming(file):
            ids = read_mapped(file)
            if ids.ndim == 1:
                ids = ids.reshape(-1, *asked.token_shape(ids.size, str(file)))
            spool.add(ids, str(file), request=request)
    if not spool.tokens:
        raise InputError("no file holds a token: save them again, while traffic runs")
    routes = clean_routes(
        FoundRoutes(spool.ids(), spool.columns(), model_name=folder.name), asked
    )
    return RoutesResult(
        "a folder of .npy, one per request", routes,
        notes=(f"{len(files):,} requests, {files[0].name} to {files[-1].name}",),
        cannot_tell=(NO_STEPS, NO_HOMES, NO_PHASE, "domains", "gate weights"),
    )


def _by_number(file: Path) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", file.stem)
    ]
