"""Attention of many requests in one forward pass, each on its own and without padding.

Knows the rows of every request in the packed step and each request's keys and values so far.
Knows nothing of experts, ranks or plans. A request's attention runs on shapes, and on memory laid
out in a way, that depend on that request alone: so its bits do not depend on its neighbours.

Axes: T rows of the packed step, h heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError

# Under this name transformers knows our attention, and our experts too.
ATTENTION_IMPLEMENTATION = EXPERTS_IMPLEMENTATION = "loadmaster"
_FIRST_CAPACITY_TOKENS = 64
# A step's rows come in whole steps of so many: torch sends what is left of a tensor after whole
# vectors down other code, with other bits, and so nothing is left, even of one number a row. (It
# takes two vectors at a time; those of AVX-512 hold 32 bfloat16.) No product computes the padding.
STEP_ROWS = 64


def padding_of(rows: int, step: int) -> int:
    """Rows to add, so that a whole number of steps is there."""
    return -rows % step


class RequestCache:
    """Keys and values of one request, all layers; memory doubles as the request grows."""

    def __init__(self) -> None:
        self.length = 0                       # tokens held after the last whole step
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key_hTD: Tensor, value_hTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add this step's rows and return all keys and values [h, length + T, D]."""
        end = self.length + key_hTD.shape[1]
        held = self._layers.get(layer)
        if held is None or held[0].shape[1] < end:
            old_key, old_value = held or (None, None)
            held = _grown(old_key, key_hTD, end), _grown(old_value, value_hTD, end)
            self._layers[layer] = held
        key, value = held
        key[:, self.length : end] = key_hTD
        value[:, self.length : end] = value_hTD
        return key[:, :end], value[:, :end]

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(k.nbytes + v.nbytes for k, v in self._layers.values())


def _grown(held: Tensor | None, like: Tensor, tokens: int) -> Tensor:
    capacity = _FIRST_CAPACITY_TOKENS
    while capacity < tokens:
        capacity *= 2
    room = like.new_empty(like.shape[0], capacity, like.shape[2])
    if held is not None:
        room[:, : held.shape[1]] = held
    return room


@dataclass
class PackedStep:
    """The requests of one forward pass, one after another; rows beyond them are padding."""

    lengths: list[int]                                    # rows of each request
    caches: list[RequestCache]
    rows: int = field(init=False)                         # rows that are not padding
    padded_rows: int = field(init=False)                  # and with the padding

    def __post_init__(self) -> None:
        self.rows = sum(self.lengths)
        # A rank without requests computes, too: its experts are asked for by the others.
        self.padded_rows = max(self.rows + padding_of(self.rows, STEP_ROWS), STEP_ROWS)

    def finish(self) -> None:
        """The step is through all layers: its rows now belong to the caches."""
        for cache, length in zip(self.caches, self.lengths, strict=True):
            cache.length += length


_STEP: ContextVar[PackedStep] = ContextVar("loadmaster_packed_step")


@contextmanager
def running(step: PackedStep) -> Iterator[None]:
    """Within this block, attention in this thread runs over the requests of `step`."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def current() -> PackedStep:
    """The step that runs in this thread."""
    return _STEP.get()


def live_rows(rows: int) -> int:
    """Of this many rows of a product, those that belong to a request: the rest is padding."""
    step = _STEP.get(None)
    return step.rows if step is not None and rows == step.padded_rows else rows


def register() -> None:
    """Make the packed attention known to transformers; safe to call again."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_IMPLEMENTATION, packed_attention)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a packed step. query [1, h, T, D] -> [1, T, h, D].

    Appends keys and values to each request's cache. Padding rows come out as zeros.
    """
    step = current()
    eager = hasattr(module, "sinks")      # learned sinks (gpt-oss): only the model's own code
    attend = _attention_of(module, eager)
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    start = 0
    for length, cache in zip(step.lengths, step.caches, strict=True):
        rows = slice(start, start + length)
        keys, values = cache.append(module.layer_idx, key[0, :, rows], value[0, :, rows])
        mask = _mask(length, keys.shape[1], sliding_window, query, whole=not eager)
        out[:, rows] = attend(
            module,
            # In memory of its own: how it lies there would tell of the step's other rows.
            query[:, :, rows].contiguous(),
            keys[None],
            values[None],
            mask,
            dropout=0.0,
            scaling=scaling,
            **options,
        )[0]
        start += length
    return out, None


def _attention_of(module: Any, eager: bool) -> Any:
    """The function that computes one request's attention as this model's own code would."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if eager:
        return sys.modules[type(module).__module__].eager_attention_forward
    return sdpa_attention_forward


def _mask(
    queries: int, keys: int, sliding_window: int | None, like: Tensor, *, whole: bool
) -> Tensor | None:
    """Additive causal mask [1, 1, queries, keys] of the last `queries` positions, typed `like`.

    None when a single query sees everything and, with `whole` (the attention function masks a
    whole sequence by itself), when all positions are asked for.
    """
    windowed = sliding_window is not None and keys > sliding_window
    if not windowed and (queries == 1 or (whole and queries == keys)):
        return None
    position = torch.arange(keys - queries, keys, device=like.device)[:, None]
    other = torch.arange(keys, device=like.device)[None, :]
    hidden = other > position
    if windowed:
        assert sliding_window is not None
        hidden |= other <= position - sliding_window
    mask = like.new_zeros(queries, keys)
    return mask.masked_fill_(hidden, torch.finfo(like.dtype).min)[None, None]


def require_supported(model: Any, where: str) -> None:
    """Raise InputError when the model's attention cannot be packed request by request."""
    for name, module in model.named_modules():
        attends = name.endswith(("self_attn", "attention", "attn"))
        if attends and not hasattr(module, "layer_idx"):
            raise InputError(
                f"{where}: the attention module {name} does not say its layer; this architecture "
                "is not served live"
            )
