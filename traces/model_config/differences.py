"""Where the weights on disk differ from the configuration: the weights decide, and a note says so.

Each function takes what the configuration says, which `where` names, and what lies on disk; it
returns what holds and appends to `notes` where the two differ. Knows figures. Reads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .expert_size import NO_DTYPE, UNKNOWN, Shape
from .layer_ranges import written
from .on_disk import DiskExperts
from .quantisation.formats import ExpertBytes

_NEAR = 0.01                # per-tensor scales and types of scales differ by less


def layers_on_disk(
    said: tuple[int, ...] | None, disk: DiskExperts, where: str, notes: list[str]
) -> tuple[int, ...]:
    """The MoE layers. said: None where the configuration does not tell."""
    if said is not None and said != disk.layers:
        notes.append(
            f"layers: the weights on disk hold experts in {written(disk.layers)}, {where} says "
            f"{written(said) or 'none'}; the weights decide"
        )
    return disk.layers


def experts_on_disk(
    said: int, layers: Sequence[int], disk: DiskExperts, where: str, notes: list[str]
) -> int:
    """Experts in a layer: what most of these layers hold."""
    counts = Counter(len(disk.bytes_LE[layer]) for layer in layers if layer in disk.bytes_LE)
    if not counts:
        return said
    found = counts.most_common(1)[0][0]
    if len(counts) > 1:
        notes.append(
            f"experts: layers on disk hold {min(counts)} to {max(counts)} of them; {found}, that "
            "of most, is taken"
        )
    if found != said:
        notes.append(
            f"experts: the weights on disk hold {found} in a layer, {where} says {said}; the "
            "weights decide"
        )
    return found


def widths_on_disk(
    hidden: int | None, intermediate: int | None, disk: DiskExperts, where: str, notes: list[str]
) -> tuple[int | None, int | None]:
    """The hidden and the intermediate width; as said where the layout does not tell."""
    found = disk.hidden_first
    if found is None and disk.widths is not None and hidden in disk.widths:
        others = disk.widths - {hidden}
        found = (hidden, next(iter(others), hidden))
    if found is None or found == (hidden, intermediate):
        return hidden, intermediate
    if hidden is not None and intermediate is not None:
        notes.append(
            f"widths: the experts on disk are {found[0]} x {found[1]}, {where} says {hidden} x "
            f"{intermediate}; the weights decide"
        )
    return found


def size_on_disk(
    said: ExpertBytes | None, disk: DiskExperts, layers: Sequence[int], shape: Shape, where: str,
    notes: list[str],
) -> tuple[ExpertBytes | None, tuple[int, ...] | None]:
    """An expert's bytes, from disk where they differ; and each expert's, where experts differ.

    said: by the configuration, which `where` names. Differences are appended to `notes`.
    """
    held = Counter(disk.bytes_LE[layer] for layer in layers if layer in disk.bytes_LE)
    if not held:
        return said, None
    found, many = held.most_common(1)[0]
    if len(held) > 1:
        notes.append(
            f"bytes per expert: {held.total() - many} of {held.total()} layers hold experts of "
            "another size on disk; that of most is taken for all"
        )
    _drop_doubts(notes)
    if len(set(found)) > 1:
        return said, found
    if said is None:
        return ExpertBytes.of_total(found[0], shape.parameters), None
    total = said.total(shape.matrices, shape.hidden, shape.intermediate)
    if abs(found[0] - total) <= _NEAR * total:
        return said, None
    notes.append(
        f"bytes per expert: {found[0]} on disk, {total} by {where}; the weights decide"
    )
    return ExpertBytes.of_total(found[0], shape.parameters), None


def _drop_doubts(notes: list[str]) -> None:
    """Take back what the configuration left open and the weights have answered."""
    notes[:] = [note for note in notes if note != NO_DTYPE and UNKNOWN not in note]
