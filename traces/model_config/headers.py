"""The headers of a folder's safetensors: every tensor's name, type and shape, no weights.

A header lies at the beginning of a file; an index, where there is one, says which file holds which
tensor. Knows the format. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from ...foundation.documents import read_json

_SINGLE = "model.safetensors"
_LARGEST_HEADER = 256 * 2**20
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "F4_E2M1": 4,
}


class TensorHeader(NamedTuple):
    """One tensor as a header lists it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return (prod(self.shape) * _BITS[self.dtype] + 7) // 8


def read_headers(folder: Path, wanted: Callable[[str], bool]) -> Iterator[TensorHeader]:
    """The tensors in the folder's safetensors; none where it has no such files.

    Where files are missing, those that an index says hold wanted ones are enough. Raises InputError
    naming a file that is not there then, or whose header cannot be read.
    """
    for path in _files(folder, wanted):
        yield from _header(path)


def _files(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    # A folder may hold the same weights twice, in Mistral's layout too: transformers' come first.
    indices = _plain_first(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = _plain_first(path for path in folder.glob("*.safetensors") if path.is_file())
        return files[:1] if files and files[0].name == _SINGLE else files
    document = read_json(indices[0])
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise InputError(f"{indices[0]}: not a safetensors index: it has no weight_map")
    names = {str(name) for name in weight_map.values()}
    there = {
        name for name in names if Path(name).name == name and (folder / name).is_file()
    }
    for tensor, name in weight_map.items() if names != there else ():
        if str(name) not in there and wanted(str(tensor)):
            raise InputError(f"{folder / str(name)}: not there, though {indices[0].name} names it")
    return [folder / name for name in sorted(there)]


def _plain_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (not path.name.startswith(_SINGLE), path.name))


def _header(path: Path) -> Iterator[TensorHeader]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(_LARGEST_HEADER, path.stat().st_size - 8):
                raise ValueError("its header is longer than the file")
            listed = json.loads(file.read(size).decode("utf-8"))
        for name, entry in listed.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _BITS:
                raise ValueError(f"{name} has the type {entry['dtype']!r}")
            yield TensorHeader(name, entry["dtype"], tuple(int(size) for size in entry["shape"]))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from error
