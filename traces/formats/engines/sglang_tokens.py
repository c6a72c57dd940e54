"""SGLang's per_token records as a trace: slots per token become experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import InputError
from ...trace import DECODE, PREFILL
from ..asked import Asked
from ..cleaning.found_routes import PADDING, FoundRoutes
from ..cleaning.routes import clean_routes
from ..result import NO_REQUESTS, ImportResult
from ..tensors import as_array, as_whole

# SGLang's forward modes as numbers.
_EXTEND, _DECODE, _MIXED, _VERIFY = 1, 2, 3, 5
_RECORDED_K = 8

Records = list[dict[str, Any]]


def import_tokens(
    path: Path, files: list[tuple[Path, Records]], map_LS: npt.NDArray[np.int64], asked: Asked
) -> ImportResult:
    """All tokens of all files, by forward pass, then rank. Steps are forward passes.

    Where every pass shows the same tokens on all ranks (tensor-parallel attention), one rank's are
    kept. Padding tokens, which went to no slot in any layer, are dropped.
    """
    records = _in_order(files, map_LS)
    ranks = {record.rank for record in records}
    alike = len(ranks) > 1 and _same_tokens_everywhere(records)
    if alike:
        records = [record for record in records if record.rank == min(ranks)]
    if not records:
        raise InputError(f"{path}: no forward pass holds a token")
    experts = int(map_LS.max()) + 1
    unknown_phase = any(record.phase_T is None for record in records)
    slots_LTK = np.concatenate([r.slots_LTK for r in records], axis=1)
    sizes = [r.slots_LTK.shape[1] for r in records]
    clean = clean_routes(FoundRoutes(
        _experts(slots_LTK, map_LS).transpose(1, 0, 2), num_experts=experts,
        columns={
            "step": np.repeat([r.step for r in records], sizes),
            "source": np.repeat([r.rank for r in records], sizes),
            "phase": None if unknown_phase else np.concatenate([r.phase_T for r in records]),
        },
    ), asked)
    notes = [f"{len(records)} records of {len(files)} files"]
    if alike:
        notes.append(f"all {len(ranks)} ranks recorded the same tokens: those of one are kept")
    return ImportResult(
        format="SGLang per_token", trace=clean.whole(), notes=(*notes, *clean.notes),
        cannot_tell=_cannot_tell(clean.top_k, unknown_phase),
    )


def _cannot_tell(top_k: int, unknown_phase: bool) -> tuple[str, ...]:
    absent = [NO_REQUESTS, "gate weights", "domains"]
    if top_k == _RECORDED_K:
        absent.append("choices beyond the eighth: a model with a larger top-k is cut to 8")
    if unknown_phase:
        absent.append("prefill or decode: a forward mode is not known")
    return tuple(absent)


@dataclass(frozen=True)
class _Record:
    """The tokens of one forward pass on one rank, without padding."""

    step: int
    rank: int
    slots_LTK: npt.NDArray[np.int64]           # -1: no choice
    phase_T: npt.NDArray[np.uint8] | None
    tokens: tuple[tuple[int, ...], ...]        # input ids and positions


def _in_order(
    files: list[tuple[Path, Records]], map_LS: npt.NDArray[np.int64]
) -> list[_Record]:
    """Records with tokens by pass, then rank, checked."""
    found = []
    for file, records in files:
        for record in records:
            step, rank = (
                as_whole(record.get(name), f"{file}: a record's {name}")
                for name in ("forward_pass_id", "rank")
            )
            where = f"{file}, pass {step}"
            slots_LTK = _slots(where, record, map_LS)
            phase_T = _phase(where, record, slots_LTK.shape[1])
            real = (slots_LTK >= 0).any(axis=(0, 2))
            if real.any():
                what = tuple(
                    tuple(_numbers(record, name, where).tolist())
                    for name in ("input_ids", "positions")
                )
                found.append(_Record(
                    step, rank, slots_LTK[:, real], None if phase_T is None else phase_T[real], what
                ))
    return sorted(found, key=lambda r: (r.step, r.rank))


def _same_tokens_everywhere(records: list[_Record]) -> bool:
    """Whether in every pass all ranks recorded equal, and named, tokens."""
    tokens_of_step: dict[int, tuple[Any, ...]] = {}
    ranks_of_step: dict[int, set[int]] = {}
    for record in records:
        if not record.tokens[0]:
            return False
        if tokens_of_step.setdefault(record.step, record.tokens) != record.tokens:
            return False
        ranks_of_step.setdefault(record.step, set()).add(record.rank)
    return len({frozenset(ranks) for ranks in ranks_of_step.values()}) == 1


def _slots(
    where: str, record: dict[str, Any], map_LS: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """[L, T, 8] slots of one record, -1 where there is none. Raises InputError on a bad record."""
    slots = as_array(record.get("topk_ids_of_layer"), f"{where}: topk_ids_of_layer")
    if slots.ndim != 3 or slots.dtype.kind not in "iu" or len(slots) != len(map_LS):
        raise InputError(
            f"{where}: topk_ids_of_layer {list(slots.shape)} is not [layers, tokens, k] with "
            f"{len(map_LS)} layers"
        )
    if slots.size and (slots.max() >= map_LS.shape[1] or slots.min() < -1):
        raise InputError(
            f"{where}: slots lie in [{slots.min()}, {slots.max()}], the map has "
            f"{map_LS.shape[1]} slots"
        )
    return slots.astype(np.int64)


def _experts(
    slots_LTK: npt.NDArray[np.int64], map_LS: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Experts [L, T, K], PADDING where there was no choice."""
    layer = np.arange(len(map_LS))[:, None, None]
    return np.where(slots_LTK >= 0, map_LS[layer, np.maximum(slots_LTK, 0)], PADDING)


def _numbers(record: dict[str, Any], name: str, where: str) -> npt.NDArray[Any]:
    """A list of whole numbers of a record; empty where it has none."""
    value = record.get(name)
    array = as_array([] if value is None else value, f"{where}: {name}")
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{where}: {name} holds {array.dtype}, not whole numbers")
    return array.reshape(-1).astype(np.int64)


def _phase(where: str, record: dict[str, Any], tokens: int) -> npt.NDArray[np.uint8] | None:
    """Phase of each token; None where the forward mode is not known."""
    mode = record.get("forward_mode")
    mode = 0 if mode is None else as_whole(mode, f"{where}: forward_mode")
    if mode in (_DECODE, _VERIFY):
        return np.full(tokens, DECODE, np.uint8)
    if mode == _EXTEND:
        return np.full(tokens, PREFILL, np.uint8)
    lengths = _numbers(record, "extend_seq_lens", where)
    if mode == _MIXED and lengths.sum() == tokens and (lengths >= 0).all():
        # In a mixed pass a sequence that adds one token decodes.
        return np.repeat(np.where(lengths == 1, DECODE, PREFILL), lengths).astype(np.uint8)
    return None
