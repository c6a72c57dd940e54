"""A .pt file: a recording of SGLang's, or tensors that a script saved. Never unpickles more.

Knows torch's files. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from .arrays import import_named
from .asked import Asked
from .engines.sglang import import_recorder, is_recorder
from .result import ImportResult
from .tensors import as_array


def import_tensors(path: Path, asked: Asked) -> ImportResult:
    """One .pt file, or a folder with the files of all ranks of one recording.

    Raises InputError on files that cannot be read without running code, or hold no tensors.
    """
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    dumps = [(file, _load(file)) for file in files]
    strange = [file for file, dump in dumps if not is_recorder(dump)]
    if not strange:
        found = import_recorder(path, dumps, asked)
        return replace(found, notes=(*found.notes, *_alone_note(path, dumps[0][1])))
    if len(files) > 1:
        raise InputError(
            f"{strange[0]}: no recording of SGLang's; tensors of a script's own making are read "
            "file by file: name one"
        )
    return import_named(path, _by_name(path, dumps[0][1]), asked)


def _by_name(path: Path, dump: Any) -> dict[str, Any]:
    """Tensors by name; "" for a lone one, and for one per layer, [T, K] each."""
    if isinstance(dump, dict):
        return {
            str(name): as_array(value, f"{path}: {name}")
            for name, value in dump.items() if hasattr(value, "detach")
        } | {str(name): value for name, value in dump.items() if isinstance(value, (int, list))}
    if hasattr(dump, "detach"):
        return {"": as_array(dump, str(path))}
    if isinstance(dump, (list, tuple)) and dump and all(hasattr(part, "detach") for part in dump):
        layers = [as_array(part, f"{path}: tensor {i}") for i, part in enumerate(dump)]
        if all(a.ndim == 2 and a.shape == layers[0].shape and a.dtype.kind in "iu"
               for a in layers):
            return {"ids": np.stack(layers, axis=1)}
    raise InputError(
        f"{path}: holds a {type(dump).__name__}, neither SGLang's recording nor tensors by name: "
        "save a tensor, or a dictionary of them"
    )


def _alone_note(path: Path, dump: Any) -> tuple[str, ...]:
    """Where passes or tokens of one rank were named and other recordings lie beside them."""
    beside = [] if path.is_dir() or "records" not in dump else sorted(path.parent.glob("*.pt"))
    if len(beside) < 2:
        return ()
    return (
        f"warning: one rank's file of a recording, and {len(beside) - 1} more lie beside it: name "
        f"the folder to read all ranks, `loadmaster trace info {path.parent}`",
    )


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: cannot be read without unpickling code, which is never done: no recorder "
            "wrote it so; record it again, or save the tensors alone"
        ) from error
    except Exception as error:  # torch raises many kinds on a broken or hostile file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: cannot be read as a recorder's file ({text}): copy or record it again"
        ) from error
