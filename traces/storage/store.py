"""Traces on disk: a folder of Parquet shards and a manifest.

    trace/manifest.json              shapes, columns, and a sha256 per shard; written last
    trace/rank-000/shard-00000.parquet

Append while recording, one writer per rank; a shard counts once the manifest names it, so a crash
loses the shard in hand and nothing else. Nothing existing is overwritten. Knows files. Knows
nothing of models, devices or how routing was obtained.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import InputError, LoadmasterError, UsageError, naming
from ...foundation.atomic_file import TEMPORARY_PREFIX, replacing, sync_folder
from ..merge import in_step_order, without_unlabelled
from ..model_spec import ModelSpec
from ..trace import RoutingTrace
from .manifest import (
    PER_TOKEN_COLUMNS,
    Manifest,
    Shard,
    commit_shard,
    create_manifest,
    read_manifest,
    require_unused,
)
from .shard_file import Columns, read_shard, write_shard

SHARD_TOKENS = 65_536


class TraceWriter:
    """Adds shards of one rank to a trace folder."""

    def __init__(self, folder: Path | str, rank: int = 0, *, resume: bool = False) -> None:
        """Join the trace that `create_manifest` began.

        resume: go on after this rank's last shard (a restarted worker). Without it, raises
        UsageError where this rank has shards already; InputError where it is none of the
        manifest's ranks.
        """
        self.folder, self.rank = Path(folder), rank
        self.manifest = read_manifest(self.folder)
        if not 0 <= rank < self.manifest.ranks:
            raise InputError(
                f"{folder}: was begun for {self.manifest.ranks} ranks, rank {rank} is none of "
                "them; give a new folder"
            )
        self._part = self.folder / f"rank-{rank:03d}"
        if not resume and self._part.exists() and any(self._part.iterdir()):
            raise UsageError(
                f"{self._part}: holds shards already; existing files are never overwritten, give "
                "a new folder"
            )
        self.tokens = sum(
            s.tokens for s in self.manifest.shards if _rank_of(s) == rank
        )

    def refusal(self) -> str | None:
        """Why nothing could be written now, as far as a look tells; None where nothing is wrong."""
        for place in (self.folder, self._part):
            if place is self._part and not place.exists():
                continue
            if not place.is_dir():
                return f"{place}: is no folder any more"
            if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
                return f"{place}: cannot be written to any more"
        return None

    def append(self, trace: RoutingTrace) -> None:
        """Write the tokens of `trace` as shards of at most SHARD_TOKENS and commit each.

        Raises InputError on a wrong shape, a missing column or an id that is no expert, before
        anything is written; LoadmasterError where the disk refuses: what was committed stays.
        """
        _check_fits(trace, self.manifest)
        for start in range(0, trace.num_tokens, SHARD_TOKENS):
            whole = start == 0 and trace.num_tokens <= SHARD_TOKENS
            piece = trace if whole else trace.select(
                np.arange(start, min(start + SHARD_TOKENS, trace.num_tokens))
            )
            self._append_shard(piece)

    def _append_shard(self, piece: RoutingTrace) -> None:
        try:
            self._part.mkdir(exist_ok=True)
            name = f"{self._part.name}/shard-{self._next_number():05d}.parquet"
            with replacing(self.folder / name) as file:
                size, sha256 = write_shard(piece, self.manifest, file)
            shard = Shard(name=name, tokens=piece.num_tokens, bytes=size, sha256=sha256)
            self.manifest = commit_shard(self.folder, shard, piece.domain_names)
        except OSError as error:
            raise LoadmasterError(
                f"{self.folder}: cannot write: {error.strerror}; the {self.tokens} tokens that "
                f"rank {self.rank} committed before are whole"
            ) from error
        self.tokens += piece.num_tokens

    def _next_number(self) -> int:
        """One past every shard file of this rank, also those a crash left uncommitted."""
        numbers = [int(p.stem.split("-")[1]) for p in self._part.glob("shard-*.parquet")]
        return max(numbers, default=-1) + 1


@dataclass(frozen=True)
class StoredTrace:
    """A trace folder that was opened and checked; reads what is asked for, nothing else."""

    folder: Path
    manifest: Manifest

    def read(
        self, *, layers: Sequence[int] | None = None, columns: Sequence[str] | None = None,
        rank: int | None = None,
    ) -> RoutingTrace:
        """The trace, or only some MoE layers (counted from 0), per-token columns, or one rank.

        Tokens come in the order recorded; those of several ranks by step, then rank.
        columns: names of PER_TOKEN_COLUMNS; None means all that were stored.
        Raises InputError on a layer or column that is not there, or ids out of range.
        """
        return without_unlabelled(self.read_as_stored(layers, columns, rank))

    def read_as_stored(
        self, layers: Sequence[int] | None = None, columns: Sequence[str] | None = None,
        rank: int | None = None, *, skip_shards: int = 0,
    ) -> RoutingTrace:
        """As `read`, with the domain that recordings keep for tokens without a label, and without
        the first shards of those asked for."""
        manifest = self.manifest
        wanted = list(range(manifest.num_layers)) if layers is None else list(layers)
        names = list(manifest.columns) if columns is None else list(columns)
        self._check_request(wanted, names)
        shards = self.shards_of(rank)[skip_shards:]
        several = len({_rank_of(s) for s in shards}) > 1 and "step" in manifest.columns
        read = [*names, "step"] if several and "step" not in names else names
        parts = [
            read_shard(self.folder / s.name, manifest, wanted, read, s.tokens) for s in shards
        ]
        joined = _joined(parts, read, (len(wanted), manifest.top_k), manifest.id_bytes)
        with naming(self.folder):
            trace = RoutingTrace.from_arrays(
                joined.pop("ids"),
                num_experts=manifest.num_experts,
                domain_names=manifest.domain_names,
                layer_indices=[manifest.layer_indices[i] for i in wanted],
                model_name=manifest.model_name,
                **joined,
            )
        if several:
            trace = in_step_order(trace)
        return trace if read == names else replace(trace, step=None)

    def shards_of(self, rank: int | None) -> list[Shard]:
        """This rank's shards, or all, by rank and number: no matter in which order they came."""
        shards = [s for s in self.manifest.shards if rank is None or _rank_of(s) == rank]
        return sorted(shards, key=lambda s: (_rank_of(s), len(s.name), s.name))

    def _check_request(self, layers: list[int], columns: list[str]) -> None:
        bad = [i for i in layers if not 0 <= i < self.manifest.num_layers]
        if bad or not layers:
            raise InputError(
                f"{self.folder}: has MoE layers 0..{self.manifest.num_layers - 1}, asked for "
                f"{bad or 'none'}"
            )
        absent = [c for c in columns if c not in self.manifest.columns]
        if absent:
            raise InputError(
                f"{self.folder}: did not record {absent}; it holds ids and "
                f"{list(self.manifest.columns)}"
            )


def open_trace(folder: Path | str, *, verify: bool = True) -> StoredTrace:
    """Open a stored trace and check every shard against the manifest's size and sha256.

    verify=False checks names and sizes only (46 GB take half a minute to hash).
    Raises InputError naming the shard that is missing, cut short, altered or a link.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a stored trace")
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        _check_shard(folder, shard, verify)
    return StoredTrace(folder, manifest)


def save_trace(
    trace: RoutingTrace, folder: Path | str, *, model: ModelSpec | None = None,
    plan_at_capture: str | None = None,
) -> Manifest:
    """Store a whole trace in a new folder; after an error no folder is left.

    Raises UsageError where the folder exists and is not empty.
    """
    return save_blocks(iter((trace,)), folder, model=model, plan_at_capture=plan_at_capture)


def save_blocks(
    blocks: Iterator[RoutingTrace], folder: Path | str, *, model: ModelSpec | None = None,
    plan_at_capture: str | None = None,
) -> Manifest:
    """As `save_trace`, of a trace that comes in parts, alike in all but their tokens."""
    folder = Path(folder)
    require_unused(folder)
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{folder.name}"
    first = next(blocks)
    manifest = Manifest(
        model_name=first.model_name or (model.name if model else ""),
        num_layers=first.num_layers, num_experts=first.num_experts, top_k=first.top_k,
        layer_indices=first.layer_indices, model=model, plan_at_capture=plan_at_capture,
        columns=tuple(c for c in PER_TOKEN_COLUMNS if getattr(first, c) is not None),
        domain_names=first.domain_names,
    )
    try:
        temporary.mkdir(parents=True)   # here, so that an error names the folder asked for
        create_manifest(temporary, manifest)
        writer = TraceWriter(temporary)
        for block in itertools.chain((first,), blocks):
            writer.append(block)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise LoadmasterError(f"{folder}: cannot write: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return writer.manifest


def _rank_of(shard: Shard) -> int:
    return int(shard.name.split("/")[0].removeprefix("rank-"))


def _check_shard(folder: Path, shard: Shard, verify: bool) -> None:
    path = folder / shard.name
    way_out = "restore it from a copy or record again"
    if path.is_symlink() or path.parent.is_symlink():
        raise InputError(f"{path}: is a link; shards must be files inside the trace's own folder")
    if not path.is_file():
        raise InputError(f"{path}: the manifest names it but it is not there; {way_out}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise InputError(
            f"{path}: has {size} bytes, the manifest says {shard.bytes}: cut short or replaced; "
            f"{way_out}"
        )
    if verify:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise InputError(
                f"{path}: its sha256 is {found[:12]}…, the manifest says {shard.sha256[:12]}…: "
                f"altered after recording; {way_out}"
            )


def _check_fits(trace: RoutingTrace, manifest: Manifest) -> None:
    """Raise InputError unless these tokens may be part of this trace."""
    have = (trace.num_layers, trace.top_k, trace.num_experts)
    need = (manifest.num_layers, manifest.top_k, manifest.num_experts)
    if have != need:
        raise InputError(
            f"tokens with (L, K, E) = {have} do not fit a trace with {need}: one trace holds one "
            "model"
        )
    absent = [c for c in manifest.columns if getattr(trace, c) is None]
    if absent:
        raise InputError(f"the trace's columns include {absent}, these tokens lack them")
    top = int(trace.ids.max()) if trace.ids.size else 0
    if top >= trace.num_experts and trace.k_of_token is None:
        token, layer, _ = np.argwhere(trace.ids >= trace.num_experts)[0]
        raise InputError(
            f"token {token}, layer {layer}: expert {top} is not in [0, {trace.num_experts}); "
            "physical slots recorded as experts?"
        )


def _joined(
    parts: list[Columns], names: list[str], shape_LK: tuple[int, int], id_bytes: int
) -> dict[str, npt.NDArray[np.generic]]:
    """Columns of all shards behind one another; ids and gates seen as [T, L, K]."""
    layers, top_k = shape_LK
    if not parts:
        empty = {"ids": np.empty((0, layers, top_k), f"u{id_bytes}")}
        for name in names:
            shape = {"gates": (0, layers, top_k), "k_of_token": (0, layers)}.get(name, (0,))
            empty[name] = np.empty(shape, np.float16 if name == "gates" else np.int64)
        return empty
    joined = {}
    for name in ("ids", *names):
        pieces = [part[name] for part in parts]
        by_layer = name in ("ids", "gates")
        column = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=int(by_layer))
        joined[name] = column.transpose(1, 0, 2) if by_layer else column
    return joined
