"""Arrays by name: .npy, .npz, .safetensors, and tensors in a .pt, as routing or as loads.

What vLLM and SGLang return per request (routed experts), saved by a script, has this form; so have
counts that a script took from a balancer. A name tells routing from loads; a lone array is told by
its shape and kind, with a word. Never unpickles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from .asked import LOAD_AXES, Asked
from .cleaning.found_routes import FoundRoutes
from .cleaning.loads import loads_result
from .cleaning.routes import clean_routes
from .result import NO_HOMES, NO_PHASE, NO_REQUESTS, NO_STEPS, ImportResult
from .tensors import as_array

SUFFIXES = (".npy", ".npz", ".safetensors")

# Names under which a column is looked for when none is given; the first that is there counts.
KEYS: dict[str, tuple[str, ...]] = {
    "ids": ("ids", "topk_ids", "routed_experts", "expert_ids", "experts", "selected_experts"),
    "gates": ("gates", "weights", "topk_weights"),
    "k_of_token": ("k_of_token",),
    "step": ("step", "steps"),
    "request": ("request", "seq", "request_id", "requests"),
    "source": ("source", "rank", "home_rank"),
    "phase": ("phase",),
    "domain": ("domain", "dom"),
    "domain_names": ("domain_names", "domains"),
    "layer_indices": ("layer_indices", "layers"),
    "num_experts": ("num_experts", "n_experts"),
    "load": ("logical_count", "load", "loads", "expert_load", "expert_counts", "expert_count",
             "tokens_per_expert", "logical_expert_load"),
}
# Of an engine's own making, so that its axes are known.
DEFINED_LOADS = ("logical_count",)
ALONE = "arr_0"             # what numpy calls an array without a name
_MEANING = {
    "step": NO_STEPS, "request": NO_REQUESTS, "source": NO_HOMES, "phase": NO_PHASE,
    "domain": "domains", "gates": "gate weights",
}


def import_arrays(path: Path, asked: Asked) -> ImportResult:
    """Read ids [T, L, K] and the columns stored with them, or loads.

    Raises InputError on a missing or ambiguous key, wrong shapes, or ids out of range.
    """
    with _opened(path) as arrays:
        return import_named(path, arrays, asked)


def import_named(path: Path, arrays: Mapping[str, Any], asked: Asked) -> ImportResult:
    """Arrays that some file holds by name; "" names one that has none."""
    wanted = _checked_keys(asked.keys)
    found = {column: _key(path, arrays, column, wanted.get(column)) for column in KEYS}
    notes = tuple(f"{c} read from {k!r}" for c, k in found.items() if k and c != k)
    if found["ids"] is None and found["load"] is None:
        lone = [name for name in arrays if name in ("", ALONE)]
        if not lone:
            raise InputError(
                f"{path}: holds {sorted(arrays)} but no ids",
                call="name the array of ids [T, L, K] with keys={'ids': …}, or of loads with "
                "keys={'load': …}",
                command="`loadmaster trace import --key ids=NAME` names the array of ids [T, L, K]",
            )
        kind = "load" if _is_loads(arrays[lone[0]], asked) else "ids"
        found[kind] = lone[0]
    data = {c: arrays[k] for c, k in found.items() if k is not None}
    if "ids" not in data:
        return _loads(path, data, found["load"] or "", asked, notes)
    return _routes(path, data, asked, notes)


def _is_loads(array: Any, asked: Asked) -> bool:
    """Whether an array without a name holds loads: it has fractions, or two axes, or was said to.
    """
    found = as_array(array, "the array")
    return asked.axes in LOAD_AXES or found.ndim == 2 or found.dtype.kind == "f"


def _routes(
    path: Path, data: dict[str, Any], asked: Asked, notes: tuple[str, ...]
) -> ImportResult:
    columns = {c: data[c] for c in ("gates", "k_of_token", *_MEANING) if c in data}
    ids = np.asarray(data["ids"])
    if ids.ndim == 1 and ids.dtype.kind in "iu":
        ids = ids.reshape(-1, *asked.token_shape(ids.size, "ids"))
    clean = clean_routes(FoundRoutes(
        ids, columns, _layer_indices(path, data), _stored_experts(path, data),
        tuple(str(n) for n in np.atleast_1d(data.get("domain_names", []))), path.stem,
    ), asked)
    return ImportResult(
        format=f"arrays ({path.suffix})", trace=clean.whole(), notes=(*notes, *clean.notes),
        cannot_tell=tuple(text for column, text in _MEANING.items() if column not in data),
    )


def _loads(
    path: Path, data: dict[str, Any], name: str, asked: Asked, notes: tuple[str, ...]
) -> ImportResult:
    loads = np.asarray(data["load"]) if not hasattr(data["load"], "detach") else data["load"]
    if isinstance(loads, np.ndarray) and loads.dtype.kind not in "fiu":
        raise InputError(f"loads must be numbers; got {loads.dtype}")
    return loads_result(
        loads, asked, name or str(path), format=f"loads ({path.suffix})",
        axes="LE" if name in DEFINED_LOADS else None, numbers=_layer_indices(path, data),
        model_name=path.stem, notes=notes,
    )


def _checked_keys(keys: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted(set(keys) - set(KEYS))
    if unknown:
        raise InputError(f"unknown column {unknown} in keys; there are {', '.join(KEYS)}")
    return dict(keys)


def _key(path: Path, arrays: Mapping[str, Any], column: str, given: str | None) -> str | None:
    if given is not None:
        if given not in arrays:
            raise InputError(
                f"{path}: has no array {given!r} for {column}; it holds {sorted(arrays)}"
            )
        return given
    return next((name for name in KEYS[column] if name in arrays), None)


def _stored_experts(path: Path, data: Mapping[str, Any]) -> int | None:
    if "num_experts" not in data:
        return None
    found = np.asarray(data["num_experts"])
    if found.size != 1 or found.dtype.kind not in "iu":
        raise InputError(
            f"{path}: num_experts must be one whole number, is {found.dtype} "
            f"{list(found.shape)}: save it as one"
        )
    return int(found.reshape(-1)[0])


def _layer_indices(path: Path, data: Mapping[str, Any]) -> tuple[int, ...] | None:
    if "layer_indices" not in data:
        return None
    found = np.asarray(data["layer_indices"])
    if found.ndim > 1 or found.dtype.kind not in "iu":
        raise InputError(
            f"{path}: layer_indices must be whole numbers [L], is {found.dtype} "
            f"{list(found.shape)}: correct it, or leave it out"
        )
    return tuple(int(i) for i in np.atleast_1d(found))


def read_mapped(path: Path) -> Any:
    """The array of an .npy file, mapped. Raises InputError on a broken file, or a pickle."""
    with _opened(path) as arrays:
        return arrays[""]


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of a file by name. Sizes are checked against the file before memory is taken."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="numpy") as file:
                yield _Archive(tuple(file.keys()), file.get_tensor)
        elif path.suffix == ".npz":
            with np.load(path) as archive:
                yield _Archive(tuple(archive.files), archive.__getitem__)
        else:
            # Mapped, a header that lies about the shape is an error instead of a huge allocation.
            yield {"": np.load(path, mmap_mode="r")}
    except InputError:
        raise
    except Exception as error:  # numpy and safetensors raise many kinds on a broken file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "pickle" in text:
            text = "it holds no plain arrays, and nothing is ever unpickled: save plain arrays"
        raise InputError(f"{path}: cannot be read as {path.suffix}: {text}") from error


class _Archive(Mapping[str, Any]):
    """An .npz or .safetensors file that reads an array when it is asked for."""

    def __init__(self, names: tuple[str, ...], read: Callable[[str], Any]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Any:
        try:
            return self._read(name)
        except TypeError as error:  # numpy has no bfloat16
            raise ValueError(f"{name}: {error}; convert it, float16 for gates") from error

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
