"""Foreign arrays read strictly: numpy's files and torch's, each with its faults in one line.

Knows syntax. Knows nothing of what the arrays mean. Nothing here runs code from a file. JSON and
YAML: `foundation/documents.py`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError


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
    except Exception as error:      # numpy raises many kinds on a broken or hostile file
        text = _first_line(error)
        if "pickle" in text:        # numpy's own text advises to run the code
            text = "it holds no plain arrays, and nothing is ever unpickled: save plain arrays"
        raise InputError(f"{path}: not numpy's .npy or .npz: {text}") from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
