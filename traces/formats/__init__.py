"""Routing and loads in other tools' files: one module per format, import only.

`import_any` recognises the format by what lies at the path. Every importer says what its format
cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import InputError, naming
from ..storage.manifest import MANIFEST_NAME
from ..storage.store import open_trace
from .arrays import SUFFIXES, import_arrays
from .result import ImportResult
from .sglang import import_recorder
from .trtllm import META, import_statistics

__all__ = ["ImportResult", "import_any", "import_arrays", "import_recorder", "import_statistics"]


def import_any(
    path: Path | str, *, num_experts: int | None = None, keys: Mapping[str, str] | None = None
) -> ImportResult:
    """Import whatever lies at `path`: arrays, an SGLang recording, TensorRT-LLM statistics.

    A stored trace is opened as it is. num_experts and keys are for arrays (see `import_arrays`).
    Raises InputError naming the formats there are when none fits, or where what was found has
    another number of experts than the one given, or no arrays to be named by keys.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is neither a file nor a folder: save what it gives to a file")
    with naming(path):
        found = _import(path, num_experts, keys)
        source = found.trace if found.trace is not None else found.profile
        if num_experts is not None and source is not None and source.num_experts != num_experts:
            raise InputError(
                f"holds {source.num_experts} experts per layer, {num_experts} were given",
                call="leave num_experts out", command="leave --num-experts out",
            )
        if keys and path.suffix not in SUFFIXES:
            raise InputError(
                f"only arrays in a file ({', '.join(SUFFIXES)}) have names to give",
                call="leave keys out", command="leave --key out",
            )
        return found


def _import(path: Path, num_experts: int | None, keys: Mapping[str, str] | None) -> ImportResult:
    if path.is_dir():
        if (path / MANIFEST_NAME).exists():
            return ImportResult(format="stored trace", trace=open_trace(path).read())
        if (path / META).exists():
            return import_statistics(path)
        if any(path.glob("*.pt")):
            return import_recorder(path)
    elif path.suffix in SUFFIXES:
        return import_arrays(path, num_experts=num_experts, keys=keys)
    elif path.suffix == ".pt":
        return import_recorder(path)
    raise InputError(
        f"{path}: not recognised; known are a stored trace (folder with {MANIFEST_NAME}), arrays "
        f"({', '.join(SUFFIXES)}), SGLang recorder files (.pt, or a folder of them), and "
        f"TensorRT-LLM statistics (folder with {META})"
    )
