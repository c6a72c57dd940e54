"""Which form lies at a path: by ending, by what a folder holds, by the first line or key.

Knows what tells forms apart. Knows nothing of how they are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...foundation.documents import read_json
from ..row_files import json_lines, rows_of
from .arrays import SUFFIXES, import_arrays
from .asked import Asked
from .cleaning.routes_result import RoutesResult
from .engines.responses import holds_responses, import_responses
from .engines.trtllm import META, import_statistics
from .per_request import import_per_request
from .result import ImportResult
from .tables.load_documents import holds_loads, import_load_document, import_load_lines
from .tables.ranks import rank_files, with_ranks
from .tables.row_columns import Columns, columns_of
from .tables.row_loads import import_row_loads
from .tables.row_routes import import_row_routes
from .tensor_file import import_tensors

FORMS = (
    f"arrays of routing or loads ({', '.join(SUFFIXES)}, .pt), SGLang recorder files (.pt, or a "
    "folder of them), a folder of .npy (one per request), TensorRT-LLM statistics (folder with "
    f"{META}), responses with routed_experts (.jsonl, .json), tables of routes or counts (.csv, "
    ".jsonl: layer, expert, and token or count), load histories (.json), and stored traces"
)
_TABLE = (
    "name its columns layer and expert (and token, request), or layer, expert and count, or layer "
    "and tokens_per_expert"
)
# What is no routing, and where it goes.
_ELSEWHERE = (
    ("physical_to_logical_map", "a plan: `loadmaster plan-import {path} --format sglang "
     "--devices RANKS --out plan.json`"),
    ("layer_list", "a plan: `loadmaster plan-import {path} --format vllm_ascend --out plan.json`"),
    ("slots", "a plan: `loadmaster plan-show {path}`"),
    ("input_length", "arrivals: `loadmaster simulate TRACE PLAN --model CHECKPOINT --arrivals "
     "{path}`"),
    ("conversations", "texts: `loadmaster trace record --text` records the routing of texts; "
     "their lengths are arrivals (`loadmaster simulate --arrivals {path}`)"),
)
_ARRIVALS = ("timestamp", "arrived_at")

Result = ImportResult | RoutesResult
TABLES = (".csv", ".jsonl")      # summed as they are read


def import_folder(folder: Path, asked: Asked) -> Result:
    """What a folder holds. Raises InputError where it is nothing known, or several things."""
    if (folder / META).exists():
        return import_statistics(folder, asked)
    kinds = {
        suffix: sorted(folder.glob(f"*{suffix}"))
        for suffix in (".pt", ".npy", ".csv", ".jsonl", ".npz", ".safetensors", ".json")
    }
    held = {suffix: files for suffix, files in kinds.items() if files}
    if ".pt" in held:
        return import_tensors(folder, asked)
    if len(held) > 1:
        held.pop(".json", None)         # what a script noted beside its data
    if len(held) > 1:
        named = next(iter(held.values()))[0]
        raise InputError(
            f"holds files of several kinds ({', '.join(held)}): name one of them, as in "
            f"`loadmaster trace info {named}`"
        )
    if ".npy" in held:
        return import_per_request(folder, asked)
    tables = held.get(".csv") or held.get(".jsonl")
    if tables and set(rank_files(tables[0])) == set(tables):
        return import_file(tables[0], asked)
    if ".jsonl" in held and _any_response(held[".jsonl"][0]):
        lines = itertools.chain.from_iterable(map(json_lines, held[".jsonl"]))
        return import_responses(lines, asked, folder.name)
    if held:
        suffix, files = next(iter(held.items()))
        raise InputError(
            f"holds {len(files)} {suffix} files: name one, as in `loadmaster trace info {files[0]}`"
        )
    raise InputError(f"not recognised; known are {FORMS}")


def import_file(path: Path, asked: Asked) -> Result:
    """What a file holds; counts of ranks that lie beside each other are summed.

    Raises InputError where it is nothing known, or a rank's counts are of another shape.
    """
    found = _import_one(path, asked)
    files = rank_files(path)
    if isinstance(found, RoutesResult) or found.profile is None or path.suffix in TABLES:
        return found
    others = [_import_one(other, asked) for other in files if other != path]
    return with_ranks(found, path, files, [r for r in others if isinstance(r, ImportResult)])


def _import_one(path: Path, asked: Asked) -> Result:
    if path.suffix in SUFFIXES:
        return import_arrays(path, asked)
    if path.suffix == ".pt":
        return import_tensors(path, asked)
    if path.suffix == ".csv":
        return _table(path, asked)
    if path.suffix == ".jsonl":
        return _lines(path, asked)
    if path.suffix == ".json":
        return _document(path, asked)
    raise InputError(f"{path}: not recognised; known are {FORMS}")


def _document(path: Path, asked: Asked) -> Result:
    value = read_json(path, finite=False)
    if holds_responses(value):
        values = value if isinstance(value, list) else [value]
        places = ((f"{path}, response {i}", one) for i, one in enumerate(values))
        return import_responses(places, asked, path.stem)
    found = import_load_document(path, value, asked)
    if found is None:
        raise _elsewhere(path, value) or InputError(
            f"{path}: holds neither counts per expert, nor responses with routed_experts; known "
            f"are {FORMS}"
        )
    return found


def _lines(path: Path, asked: Asked) -> Result:
    """JSON lines, by the first: a response, a row of a table, or a window of loads."""
    first = _first(json_lines(path), path)
    if isinstance(first, dict) and "layer" in columns_of(first):
        return _table(path, asked)
    if _any_response(path):
        return import_responses(json_lines(path), asked, path.stem)
    if holds_loads(first):
        return import_load_lines(path, json_lines(path), asked)
    raise _elsewhere(path, first) or InputError(f"{path}: not recognised: {_TABLE}")


def _any_response(path: Path) -> bool:
    """Whether one of the first lines is a response with routing: the first may have failed."""
    return any(holds_responses(value) for _, value in itertools.islice(json_lines(path), 100))


def _table(path: Path, asked: Asked) -> Result:
    first = _first(rows_of(path), path)
    columns = columns_of(first)
    if "counts" in columns or ("count" in columns and "expert" in columns):
        files = rank_files(path)
        return import_row_loads(path, [(f, _alike(f, columns)) for f in files], columns, asked)
    if "layer" in columns and ("expert" in columns or "experts" in columns):
        return import_row_routes(path, rows_of(path), columns, asked)
    raise _elsewhere(path, first) or InputError(
        f"{path}: its columns {sorted(map(str, first))[:8]} are neither routes nor counts: {_TABLE}"
    )


def _alike(path: Path, columns: Columns) -> Iterator[tuple[str, Any]]:
    """A rank's rows. Raises InputError where they have other columns than the first rank's."""
    for where, row in rows_of(path):
        if missing := sorted(set(columns.names.values()) - set(row)):
            raise InputError(f"{where}: lacks {missing[0]}, which the other rows have")
        yield where, row


def _first(rows: Iterator[tuple[str, Any]], path: Path) -> Any:
    for _, row in rows:
        return row
    raise InputError(f"{path}: is empty: save it again, while traffic runs")


def _elsewhere(path: Path, value: Any) -> InputError | None:
    """A refusal that says which verb takes such a file."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        return None
    keys = {str(key) for key in first}
    for key, said in _ELSEWHERE:
        if key in keys:
            return InputError(f"{path}: holds no routing but {said.format(path=path)}")
    if {key.lower() for key in keys} & set(_ARRIVALS):
        return InputError(
            f"{path}: holds no routing but arrivals: `loadmaster simulate TRACE PLAN --model "
            f"CHECKPOINT --arrivals {path}`"
        )
    return None
