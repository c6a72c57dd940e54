"""Routing and loads in other tools' files: one module per form, import only.

`import_any` recognises the form by what lies at the path. Every importer says what its form cannot
tell; `routes` and `loads` clean what they find, and say what they did. `open_any` leaves long
streams on disk, for whoever writes them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...errors import InputError, as_parameters, naming
from ..model_config.layer_ranges import parse_layers
from ..model_spec import ModelSpec
from ..storage.manifest import MANIFEST_NAME
from ..storage.store import open_trace
from .arrays import SUFFIXES
from .asked import Asked
from .cleaning.routes_result import RoutesResult
from .recognise import import_file, import_folder
from .result import ImportResult

__all__ = ["Asked", "ImportResult", "RoutesResult", "import_any", "open_any", "read_any"]


def import_any(
    path: Path | str, *, num_experts: int | None = None, keys: Mapping[str, str] | None = None,
    axes: str | None = None, layers: str | tuple[int, ...] | None = None,
    model: ModelSpec | None = None, top_k: int | None = None, zero_experts: int | None = None,
    drop_repeated: bool = False,
) -> ImportResult:
    """Import whatever lies at `path`: arrays, dumps, recordings, responses, tables, histories.

    A stored trace is opened as it is. num_experts: E. keys: the file's own name for a column of
    `arrays.KEYS`. axes: of an array, as in "WLE". layers: the model's own numbers of its rows, as
    in "3-60". model: which rows are MoE layers. top_k: K, where rows do not tell tokens apart.
    zero_experts: how many ids beyond E stand for experts that compute nothing. drop_repeated: leave
    out tokens that all take one route. Raises InputError naming the forms there are when none fits,
    and where what was found contradicts what was said.
    """
    numbers = parse_layers(layers) if isinstance(layers, str) else layers
    found = read_any(path, Asked(
        num_experts, dict(keys or {}), axes, numbers, model, top_k, zero_experts, drop_repeated,
    ))
    return replace(found, notes=tuple(map(as_parameters, found.notes)))


def read_any(path: Path | str, asked: Asked) -> ImportResult:
    """As `import_any`; its notes name the command line's options."""
    found = open_any(path, asked)
    return found.whole() if isinstance(found, RoutesResult) else found


def open_any(path: Path | str, asked: Asked) -> ImportResult | RoutesResult:
    """As `read_any`; a stream of routes stays on disk."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is neither a file nor a folder: save what it gives to a file")
    with naming(path):
        if path.is_dir() and (path / MANIFEST_NAME).exists():
            found: ImportResult | RoutesResult = ImportResult(
                format="stored trace", trace=open_trace(path).read()
            )
        else:
            found = import_folder(path, asked) if path.is_dir() else import_file(path, asked)
        _require_as_said(found, path, asked)
    return found


def _require_as_said(
    found: ImportResult | RoutesResult, path: Path, asked: Asked
) -> None:
    if isinstance(found, RoutesResult):
        experts: int | None = found.routes.num_experts
    else:
        source = found.trace if found.trace is not None else found.profile
        experts = None if source is None else source.num_experts
    if asked.num_experts is not None and experts not in (None, asked.num_experts):
        raise InputError(
            f"holds {experts} experts per layer, {asked.num_experts} were given: leave "
            "--num-experts out"
        )
    if asked.keys and path.suffix not in (*SUFFIXES, ".pt"):
        raise InputError(
            f"only arrays in a file ({', '.join(SUFFIXES)}, .pt) have names to give",
            call="leave keys out", command="leave --key out",
        )
