"""Responses of a serving engine that carry the routing of their tokens (`routed_experts`).

vLLM: choices[].routed_experts, base64 of an .npy [tokens, hidden layers, K]. SGLang:
meta_info.routed_experts or sglext.routed_experts, base64 of int32 without a shape. Dynamo passes
either on (nvext). Plain lists are read too. Dense layers are zeros in all of them. One response a
line (.jsonl), or a document of one or many (.json); every array is a request.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import InputError
from ..asked import Asked
from ..cleaning.found_routes import FoundRoutes
from ..cleaning.routes import clean_routes
from ..cleaning.routes_result import RoutesResult
from ..cleaning.spool import Spool
from ..result import NO_HOMES, NO_PHASE, NO_STEPS

KEY = "routed_experts"
_NPY = b"\x93NUMPY"


def holds_responses(value: Any) -> bool:
    """Whether a document, or a line of one, is a response with routing."""
    return next(_arrays(value), None) is not None


def import_responses(
    values: Iterable[tuple[str, Any]], asked: Asked, model_name: str
) -> RoutesResult:
    """Documents, each with the place it is from. Raises InputError naming that."""
    spool, requests, without = Spool(), 0, 0
    for where, value in values:
        before = requests
        for found in _arrays(value):
            spool.add(_decoded(found, asked, where), where, request=requests)
            requests += 1
        without += requests == before
    if not spool.tokens:
        raise InputError("no response holds a routed token: ask the engine to return them")
    notes = [f"{requests:,} requests"]
    if without:
        notes.append(f"{without:,} responses without {KEY} skipped")
    routes = clean_routes(
        FoundRoutes(spool.ids(), spool.columns(), model_name=model_name), asked
    )
    return RoutesResult(
        "responses with routed experts", routes, notes=tuple(notes),
        cannot_tell=(NO_STEPS, NO_HOMES, NO_PHASE, "domains", "gate weights"),
    )


def _arrays(value: Any) -> Iterator[Any]:
    """Every value under `routed_experts`, in order, however deep."""
    if isinstance(value, dict):
        for key, below in value.items():
            if key == KEY:
                if below is not None:
                    yield below
            else:
                yield from _arrays(below)
    elif isinstance(value, list):
        for below in value:
            if isinstance(below, (dict, list)):
                yield from _arrays(below)


def _decoded(value: Any, asked: Asked, where: str) -> npt.NDArray[Any]:
    """[T, R, K] ids of one request."""
    if isinstance(value, list):
        try:
            return np.array(value, np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where}: {KEY} is no array of whole numbers: {error}") from None
    if not isinstance(value, str):
        raise InputError(f"{where}: {KEY} is a {type(value).__name__}, neither base64 nor a list")
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: {KEY} is not base64: {error}") from None
    if raw.startswith(_NPY):
        try:
            return _npy(raw)
        except (ValueError, TypeError, EOFError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{where}: {KEY} is a broken .npy: {said}") from None
    if len(raw) % 4:
        raise InputError(f"{where}: {KEY} is neither an .npy nor whole int32 numbers")
    flat = np.frombuffer(raw, "<i4")
    return flat.reshape(-1, *asked.token_shape(flat.size, f"{where}: {KEY}"))


def _npy(raw: bytes) -> npt.NDArray[Any]:
    """The array of an .npy file's bytes. Raises ValueError before memory is taken for a lie."""
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} is not known")
    shape, by_column, dtype = read(file)
    if dtype.kind not in "iu" or by_column:
        raise ValueError(f"it holds {dtype}, not whole numbers in the order of C")
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize != len(raw) - file.tell():
        raise ValueError(f"it says {list(shape)}, which is not what it holds")
    return np.frombuffer(raw, dtype, count, file.tell()).reshape(shape)
