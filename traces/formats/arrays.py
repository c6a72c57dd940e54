"""Routing as plain arrays: .npy, .npz or .safetensors holding ids [T, L, K].

What vLLM and SGLang return per request (routed experts), saved by a script, has this form. Arrays
of loads ([L, E] or [W, L, E]) under a load key become a profile. Never unpickles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ..profile import Profile
from ..trace import RoutingTrace
from .result import LOADS_ONLY, ImportResult

SUFFIXES = (".npy", ".npz", ".safetensors")

# Names under which a column is looked for when none is given; the first that is there counts.
KEYS: dict[str, tuple[str, ...]] = {
    "ids": ("ids", "topk_ids", "routed_experts", "expert_ids", "experts"),
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
    "load": ("logical_count", "load", "loads", "expert_load"),
}
_MEANING = {
    "step": "which tokens ran in one step: steps are made by interleaving requests",
    "request": "requests: blocks of 256 tokens stand for them",
    "source": "home ranks: request index modulo ranks stands for them",
    "phase": "prefill or decode",
    "domain": "domains",
    "gates": "gate weights",
}


def import_arrays(
    path: Path, *, num_experts: int | None = None, keys: Mapping[str, str] | None = None
) -> ImportResult:
    """Read ids [T, L, K] and the columns stored with them.

    keys: the file's own name for a column of KEYS, where it is not one of the usual ones.
    num_experts: E; needed unless the file says it. An .npy holds ids alone.
    Raises InputError on a missing or ambiguous key, wrong shapes, or ids out of range.
    """
    wanted = _checked_keys(keys)
    with _opened(path) as arrays:
        found = {column: _key(path, arrays, column, wanted.get(column)) for column in KEYS}
        data = {c: arrays[k] for c, k in found.items() if k is not None}
    if "ids" not in data:
        if "load" in data:
            return _loads(path, data)
        raise InputError(
            f"{path}: holds {sorted(arrays)} but no ids",
            call="name the array of ids [T, L, K] with keys={'ids': …}",
            command="`loadmaster trace import --key ids=NAME` names the array of ids [T, L, K]",
        )
    experts = _num_experts(path, data, num_experts)
    columns = {c: data.get(c) for c in ("gates", "k_of_token", *_MEANING) if c in data}
    trace = RoutingTrace.from_arrays(
        data["ids"], num_experts=experts, model_name=path.stem,
        domain_names=[str(n) for n in np.atleast_1d(data.get("domain_names", []))],
        layer_indices=_layer_indices(path, data),
        **columns,
    )
    if trace.num_tokens == 0:
        raise InputError(f"{path}: holds no tokens: save it again, while traffic runs")
    absent = [text for column, text in _MEANING.items() if column not in data]
    return ImportResult(
        format=f"arrays ({path.suffix})", trace=trace, cannot_tell=tuple(absent),
        notes=tuple(f"{c} read from {k!r}" for c, k in found.items() if k and c != k),
    )


def _checked_keys(keys: Mapping[str, str] | None) -> dict[str, str]:
    unknown = sorted(set(keys or ()) - set(KEYS))
    if unknown:
        raise InputError(f"unknown column {unknown} in keys; there are {', '.join(KEYS)}")
    return dict(keys or {})


def _key(path: Path, arrays: Mapping[str, Any], column: str, given: str | None) -> str | None:
    if given is not None:
        if given not in arrays:
            raise InputError(
                f"{path}: has no array {given!r} for {column}; it holds {sorted(arrays)}"
            )
        return given
    return next((name for name in KEYS[column] if name in arrays), None)


def _num_experts(path: Path, data: Mapping[str, Any], given: int | None) -> int:
    stored = None
    if "num_experts" in data:
        found = np.asarray(data["num_experts"])
        if found.size != 1 or found.dtype.kind not in "iu":
            raise InputError(
                f"{path}: num_experts must be one whole number, is {found.dtype} "
                f"{list(found.shape)}: save it as one"
            )
        stored = int(found.reshape(-1)[0])
    if given is not None and stored is not None and given != stored:
        raise InputError(f"{path}: says {stored} experts, {given} were given: leave one out")
    experts = given if given is not None else stored
    if experts is None:
        raise InputError(
            f"{path}: does not say how many experts a layer has, and the largest id need not be "
            "the last expert", call="give num_experts", command="give --num-experts",
        )
    return experts


def _layer_indices(path: Path, data: Mapping[str, Any]) -> tuple[int, ...]:
    found = np.asarray(data.get("layer_indices", np.empty(0, np.int64)))
    if found.ndim > 1 or found.dtype.kind not in "iu":
        raise InputError(
            f"{path}: layer_indices must be whole numbers [L], is {found.dtype} "
            f"{list(found.shape)}: correct it, or leave it out"
        )
    return tuple(int(i) for i in np.atleast_1d(found))


def _loads(path: Path, data: Mapping[str, Any]) -> ImportResult:
    indices = _layer_indices(path, data)
    profile = Profile.from_loads(data["load"], layer_indices=indices, model_name=path.stem)
    return ImportResult(
        format=f"loads ({path.suffix})", profile=profile,
        cannot_tell=("how many experts a token chooses: K is taken as 1", *LOADS_ONLY),
    )


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
            yield {"ids": np.array(np.load(path, mmap_mode="r"))}
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
