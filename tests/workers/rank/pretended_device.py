"""A device that is not there: tensors on it lie in the host's memory, but say that they do not.

Operations that mix it with the host fail, as on a GPU; so does reading it without a replica. What a
test runs on it shows that every tensor is where it must be, not how fast or exact a GPU is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
CROSSING = {"aten::_to_copy", "aten::copy_"}      # what moves tensors between devices


class Pretended(torch.Tensor):
    """A tensor on the device; `held` is its content."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # results keep their own class

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=f"{NAME}:0",
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(op, *args, **(kwargs or {}))


@cache
def install() -> str:
    """Make the device known to torch, once in a process; returns its name."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")      # what makes new tensors
    _KEPT.append(library)
    return f"{NAME}:0"


_KEPT: list[Any] = []     # a library that is collected takes its functions with it


def _run(op: Any, *args: Any, **options: Any) -> Any:
    given = [x for x in _flat([*args, *options.values()]) if isinstance(x, torch.Tensor)]
    for x in given:
        strange = not isinstance(x, Pretended) and x.dim() > 0
        if strange and op._schema.name not in CROSSING:
            raise RuntimeError(f"{op._schema.name} mixes the device with the host's memory")
    away = {id(x.held): x for x in given if isinstance(x, Pretended)}
    device = options.get("device")
    to_host = device is not None and torch.device(device).type == "cpu"
    out = op(*map(_unwrapped, args), **{k: _unwrapped(v) for k, v in options.items()})

    def wrapped(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(wrapped, x))
        if not isinstance(x, torch.Tensor) or to_host or any(x is y for y in given):
            return x
        return away[id(x)] if id(x) in away else Pretended(x)

    if op.is_view and not given[0].is_inference():
        with torch.inference_mode(False):     # a view is an inference tensor where its base is one
            return wrapped(out)
    return wrapped(out)


def _flat(values: list[Any]) -> Iterator[Any]:
    for x in values:
        if isinstance(x, list | tuple):
            yield from x
        else:
            yield x


def _unwrapped(x: Any) -> Any:
    if isinstance(x, Pretended):
        return x.held
    if isinstance(x, list | tuple):
        return [_unwrapped(y) for y in x]
    if isinstance(x, torch.device) and x.type == NAME:
        return torch.device("cpu")
    return x
