"""A packed step's rows: which end a chunk, what they predict, what routing they replay.

Pure functions over chunks and tensors on the host. Knows nothing of models, ranks or exchange.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import LoadmasterError
from ..protocol.step_messages import Chunk
from .attention import padding_of
from .expert_layer import RoutingOverride

# What follows the head has a whole vocabulary a row: fewer rows than STEP_ROWS leave nothing over.
HEAD_ROWS = 16


def last_rows(chunks: tuple[Chunk, ...]) -> Tensor:
    """Rows that predict a wanted token, padded to whole steps of HEAD_ROWS; at least one."""
    ends = np.cumsum([len(c.tokens) for c in chunks])
    rows = [int(end) - 1 for end, c in zip(ends, chunks, strict=True) if c.wants_token]
    return torch.tensor(rows + [0] * (padding_of(len(rows), HEAD_ROWS) if rows else HEAD_ROWS))


def greedy(logits_TV: Tensor, chunks: tuple[Chunk, ...]) -> dict[int, int]:
    """The likeliest next token of each chunk that needs one; the lower id among equals."""
    wanting = [c.request for c in chunks if c.wants_token]
    best = logits_TV[: len(wanting)].argmax(dim=-1).tolist()
    return dict(zip(wanting, best, strict=True))


def logits_by_request(
    logits_TV: Tensor, chunks: tuple[Chunk, ...]
) -> dict[int, Any]:
    parts = torch.split(logits_TV[: sum(len(c.tokens) for c in chunks)].float(),
                        [len(c.tokens) for c in chunks])
    return {c.request: part.numpy() for c, part in zip(chunks, parts, strict=True)}


def replay_of(chunks: tuple[Chunk, ...], layers: int, top_k: int) -> RoutingOverride | None:
    if not any(c.replay is not None for c in chunks):
        return None
    parts = [c.replay for c in chunks]
    if any(p is None for p in parts):
        raise LoadmasterError("a step replays the routing of all its chunks or of none")
    ids = np.concatenate([p.ids_LTK for p in parts if p is not None], axis=1)
    gates = np.concatenate([p.gates_LTK for p in parts if p is not None], axis=1)
    return RoutingOverride(
        torch.from_numpy(ids), torch.from_numpy(gates),
        torch.zeros(layers, ids.shape[1], top_k, dtype=torch.int64),
    )


def own_ids(replay: RoutingOverride | None, chunks: tuple[Chunk, ...]) -> dict[int, Any]:
    if replay is None:
        return {}
    parts = torch.split(replay.own_ids_LTK, [len(c.tokens) for c in chunks], dim=1)
    return {c.request: part.numpy() for c, part in zip(chunks, parts, strict=True)}
