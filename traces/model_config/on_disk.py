"""What the weights on disk are: the experts' tensors as the safetensors' headers list them.

A header says every tensor's shape, type and place; nothing after it is read. Each layer's experts
are counted and weighed with their scales. Knows headers and names of tensors. Knows nothing of
configurations: whoever reads both says where they differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...foundation.documents import read_json

_LARGEST_HEADER = 256 * 2**20
_LAYER = r"(?P<before>^|.*\.)(?:layers|h|blocks|decoder_layer)\.(?P<layer>\d+)\."
_NAMES = (
    # one tensor an expert, or all experts stacked: ...experts.7.w1.weight, ...experts.gate_up_proj
    re.compile(_LAYER + r"(?:.*\.)?experts\.(?:(?P<expert>\d+)\.)?(?P<tensor>.+)$"),
    re.compile(_LAYER + r"block_sparse_moe\.(?P<tensor>(?:input|output)_linear\..+)$"),
    re.compile(_LAYER + r"moe\.(?P<tensor>(?:gate|up|down)_proj\..+)$"),
)
_DRAFT = re.compile(r"(^|\.)(mtp|nextn|draft)")
_DOWN = re.compile(r"(^|\.)(down_proj|w2|output_linear)(\.weight)?$")
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "F4_E2M1": 4,
}
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
    files = _files(folder)
    if not files:
        return None
    found = _Found()
    for path in files:
        for name, entry in _header(path):
            found.take(name, entry, hidden_layers)
    return found.whole(folder, num_experts)


def dense_bytes(folder: Path, hidden_layers: int | None = None) -> int | None:
    """Bytes of all tensors but routed experts and draft layers; None where there are no weights.

    Raises InputError naming a file whose header cannot be read.
    """
    files = _files(folder)
    if not files:
        return None
    total = 0
    for path in files:
        for name, entry in _header(path):
            if not (any(form.match(name) for form in _NAMES) or _drafts(name, hidden_layers)):
                total += (prod(int(n) for n in entry["shape"]) * _BITS[entry["dtype"]] + 7) // 8
    return total


def _drafts(name: str, hidden_layers: int | None) -> bool:
    """Whether a tensor is of layers that only guess tokens ahead."""
    found = re.match(_LAYER, name)
    beyond = found is not None and hidden_layers is not None and (
        int(found["layer"]) >= hidden_layers
    )
    return beyond or bool(_DRAFT.search(name))


class _Found:
    """Tensors of experts, summed as headers are read."""

    def __init__(self) -> None:
        self.alone: dict[tuple[bool, int], dict[int, int]] = {}
        self.stacked: dict[tuple[bool, int], list[tuple[int, int]]] = {}   # (leading axis, bytes)
        self.widths: set[tuple[bool, int, int]] = set()     # (one expert's, outputs, inputs)

    def take(self, name: str, entry: dict[str, Any], hidden_layers: int | None) -> None:
        """Count the tensor, if it is of routed experts."""
        match = next((found for form in _NAMES if (found := form.match(name))), None)
        if match is None or "encoder." in match["before"]:
            return
        layer = int(match["layer"])
        draft = bool(_DRAFT.search(match["before"]))
        draft = draft or (hidden_layers is not None and layer >= hidden_layers)
        shape = [int(size) for size in entry["shape"]]
        size = (prod(shape) * _BITS[entry["dtype"]] + 7) // 8
        expert = match.groupdict().get("expert")
        if expert is not None:
            experts = self.alone.setdefault((draft, layer), {})
            experts[int(expert)] = experts.get(int(expert), 0) + size
        elif shape:
            self.stacked.setdefault((draft, layer), []).append((shape[0], size))
        if not draft and _DOWN.search(match["tensor"]) and entry["dtype"] in _WHOLE_WEIGHTS:
            if expert is not None and len(shape) == 2:
                self.widths.add((True, *shape))             # type: ignore[arg-type]
            elif expert is None and len(shape) == 3:
                self.widths.add((False, *shape[1:]))        # type: ignore[arg-type]

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


def _files(folder: Path) -> list[Path]:
    """The safetensors that an index names, else all there are; raises where one is missing."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        document = read_json(indices[0])
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict):
            raise InputError(f"{indices[0]}: not a safetensors index: it has no weight_map")
        names = sorted({
            str(file) for tensor, file in weight_map.items()
            if any(form.match(str(tensor)) for form in _NAMES)
        })
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{folder / name}: not there, though {indices[0].name} names it")
        return [folder / name for name in names]
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _header(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(_LARGEST_HEADER, path.stat().st_size - 8):
                raise ValueError("its header is longer than the file")
            text = file.read(size).decode("utf-8")
        header = json.loads(text)
        for name, entry in header.items():
            if name != "__metadata__":
                if entry["dtype"] not in _BITS:
                    raise ValueError(f"{name} has the type {entry['dtype']!r}")
                yield name, entry
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from error
