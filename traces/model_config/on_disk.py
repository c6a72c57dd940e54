"""What the weights on disk are: the experts' tensors as the safetensors' headers list them.

A header says every tensor's shape, type and place; nothing after it is read. Each layer's experts
are counted and weighed with their scales. Knows headers and names of tensors. Knows nothing of
configurations: whoever reads both says where they differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from .headers import TensorHeader, read_headers
from .quantisation.module_names import DRAFT, ELSEWHERE

_LAYER = re.compile(r"(?P<before>^|.*\.)(?:layers|h|blocks|decoder_layer)\.(?P<layer>\d+)\.")
# All experts of a layer in one tensor, whose name does not say so.
_STACKED = re.compile(r"(block_sparse_moe\.(input|output)_linear|moe\.(gate|up|down)_proj)\.")
_DOWN = re.compile(r"(^|\.)(down_proj|w2|output_linear)(\.weight)?$")
_WHOLE_WEIGHTS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")     # one element a weight


@dataclass(frozen=True)
class DiskExperts:
    """The experts that a folder's weights hold."""

    bytes_LE: dict[int, tuple[int, ...]]       # by the model's own layer: bytes of each expert
    draft_bytes_LE: dict[int, tuple[int, ...]]
    widths: frozenset[int] | None              # of the matrix out of an expert: {H, I}, if told
    hidden_first: tuple[int, int] | None       # (H, I), where the layout tells which is which

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that hold experts, in the model's own numbers."""
        return tuple(sorted(self.bytes_LE))


def read_experts(
    folder: Path, hidden_layers: int | None = None, num_experts: int | None = None
) -> DiskExperts | None:
    """The experts in the folder's safetensors; None where it holds none.

    hidden_layers: layers from this number on are draft layers. num_experts: what the configuration
    says, to tell experts stacked in one matrix apart. Raises InputError naming a file
    whose header cannot be read or a layer whose experts are not all there.
    """
    found = _Found()
    for header in read_headers(folder, lambda name: _placed(name) is not None):
        found.take(header, hidden_layers)
    return found.whole(folder, num_experts)


def dense_bytes(folder: Path, hidden_layers: int | None = None) -> int | None:
    """Bytes of all tensors but routed experts and draft layers; None where there are no weights.

    Raises InputError naming a file whose header cannot be read.
    """
    sizes = [
        header.bytes for header in read_headers(folder, lambda _name: True)
        if _placed(header.name) is None and not _drafts(header.name, hidden_layers)
    ]
    return sum(sizes) if sizes else None


def _drafts(name: str, hidden_layers: int | None) -> bool:
    """Whether a tensor is of layers that only guess tokens ahead."""
    found = _LAYER.match(name)
    if found is not None and hidden_layers is not None and int(found["layer"]) >= hidden_layers:
        return True
    return DRAFT.search(name) is not None


class _Place(NamedTuple):
    """Whose tensor it is: a layer's, of one expert or (None) of all, and what the rest says."""

    layer: int
    draft: bool
    expert: int | None
    tensor: str


def _placed(name: str) -> _Place | None:
    """The place of a tensor of routed experts by its name; None: it is another's."""
    before, mark, rest = name.rpartition("experts.")
    if mark and (not before or before.endswith(".")):
        number, _, tensor = rest.partition(".")
        expert = int(number) if number.isdigit() else None
        tensor = tensor if expert is not None else rest
    elif found := _STACKED.search(name):
        before, expert, tensor = name[: found.start()], None, name[found.start():]
    else:
        return None
    layer = _layer_of(before)
    return None if layer is None else _Place(*layer, expert, tensor)


@cache
def _layer_of(before: str) -> tuple[int, bool] | None:
    """The layer that a name's beginning means, and whether it is a draft layer by that."""
    found = _LAYER.match(before)
    if found is None or ELSEWHERE.search(found["before"]):
        return None
    return int(found["layer"]), DRAFT.search(found["before"]) is not None


class _Found:
    """Tensors of experts, summed as headers are read."""

    def __init__(self) -> None:
        self.alone: dict[tuple[bool, int], dict[int, int]] = {}
        self.stacked: dict[tuple[bool, int], list[tuple[int, int]]] = {}   # (leading axis, bytes)
        self.widths: set[tuple[bool, int, int]] = set()     # (one expert's, outputs, inputs)

    def take(self, header: TensorHeader, hidden_layers: int | None) -> None:
        """Count the tensor, if it is of routed experts."""
        place = _placed(header.name)
        if place is None:
            return
        draft = place.draft or (hidden_layers is not None and place.layer >= hidden_layers)
        at, alone = (draft, place.layer), place.expert is not None
        if place.expert is not None:
            experts = self.alone.setdefault(at, {})
            experts[place.expert] = experts.get(place.expert, 0) + header.bytes
        elif header.shape:
            self.stacked.setdefault(at, []).append((header.shape[0], header.bytes))
        if draft or header.dtype not in _WHOLE_WEIGHTS or not _DOWN.search(place.tensor):
            return
        if len(header.shape) == (2 if alone else 3):
            outputs, inputs = header.shape[-2:]
            self.widths.add((alone, outputs, inputs))

    def whole(self, folder: Path, num_experts: int | None) -> DiskExperts | None:
        """Everything found, checked to be complete."""
        sizes: dict[bool, dict[int, tuple[int, ...]]] = {False: {}, True: {}}
        for draft, layer in sorted({*self.alone, *self.stacked}):
            alone = self.alone.get((draft, layer), {})
            stacked = self.stacked.get((draft, layer), [])
            count = len(alone) or _experts_of(stacked, num_experts)
            if alone and sorted(alone) != list(range(count)):
                missing = next(e for e in range(max(alone) + 1) if e not in alone)
                raise InputError(f"{folder}: layer {layer} has no expert {missing} on disk")
            shares = sum(size for axis, size in stacked if axis % count == 0) // count
            sizes[draft][layer] = tuple(alone.get(e, 0) + shares for e in range(count))
        if not sizes[False]:
            return None
        one = next(iter(self.widths)) if len(self.widths) == 1 else None
        return DiskExperts(
            sizes[False], sizes[True],
            widths=None if one is None else frozenset(one[1:]),
            hidden_first=None if one is None or not one[0] else (one[1], one[2]),
        )


def _experts_of(stacked: list[tuple[int, int]], said: int | None) -> int:
    """How many experts lie in stacked tensors: their leading axis, or that many in one matrix."""
    axis, _ = max(stacked, key=lambda one: one[1])
    if said and axis != said and axis % said == 0 and all(a % said == 0 for a, _ in stacked):
        return said
    return axis
