"""Foreign files read strictly: text, JSON, YAML, numpy and torch, each with its faults in one line.

Knows syntax. Knows nothing of what the files mean. Nothing here runs code from a file.
"""

from __future__ import annotations

import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError


def read_json(path: Path) -> Any:
    """Raises InputError on anything but JSON, a key given twice, NaN and infinity."""
    text = _read_text(path)
    try:
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {_first_line(error)}") from error


def read_yaml(path: Path) -> Any:
    """Raises InputError on anything but plain YAML, or a key given twice."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Plain values only; a key given twice is an error, not the last one's."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        return _unique_keys(
            (loader.construct_object(k, deep=True), loader.construct_object(v, deep=True))
            for k, v in node.value
        )

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(_read_text(path), Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not YAML: {_first_line(error)}") from error


def read_npy(path: Path) -> npt.NDArray[Any]:
    """The one array of an .npy file."""
    found = _load_numpy(path)
    if not isinstance(found, np.ndarray):
        raise InputError(f"{path}: holds several arrays; an .npy file of one was expected")
    return found


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an .npz file by name."""
    found = _load_numpy(path)
    if isinstance(found, np.ndarray):
        raise InputError(f"{path}: holds one array without a name; an .npz file was expected")
    return found


def read_pt(path: Path) -> Any:
    """What torch.save wrote: tensors in plain containers, never unpickled beyond them."""
    import torch

    _require_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:     # torch's own text advises to run the code
        raise InputError(
            f"{path}: not a .pt file of tensors alone: the rest could only be read by running code "
            "from it, which is never done; save the tensors alone"
        ) from error
    except Exception as error:  # torch raises many kinds on a broken or hostile file
        raise InputError(
            f"{path}: not a .pt file of tensors alone: {_first_line(error)}"
        ) from error


def whole_array(value: Any, axes: str, where: str) -> npt.NDArray[np.int64]:
    """A tensor or array of whole numbers with as many axes as `axes` names.

    Raises InputError on other kinds (floats too: NaN and 2.5 are no ids) or shapes.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: no array of numbers: {_first_line(error)}") from error
    if array.dtype.kind not in "iu" or array.ndim != axes.count(",") + 1 or 0 in array.shape:
        raise InputError(
            f"{where}: must be whole numbers [{axes}], is {array.dtype} {list(array.shape)}"
        )
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{where}: holds a number beyond 63 bits")
    return array.astype(np.int64)


def _load_numpy(path: Path) -> npt.NDArray[Any] | dict[str, npt.NDArray[Any]]:
    _require_file(path)
    try:
        # Mapped, so that a header that promises more than the file holds costs no memory.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            return np.array(found)
        with found:
            return {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error,
            NotImplementedError) as error:
        raise InputError(f"{path}: not numpy's .npy or .npz: {_first_line(error)}") from error


def _read_text(path: Path) -> str:
    _require_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as text: {_first_line(error)}") from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")


def _unique_keys(pairs: Any) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {str(key)[:40]!r} stands twice")
        out[key] = value
    return out


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of a plan")


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
