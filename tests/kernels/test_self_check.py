"""The self-check: what a row's bits may not depend on, and what happens where they do.

Cheats stand for libraries that take other code for one row, for few, or at some places: what real
ones do on processors that are not at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loadmaster.errors import InputError, LoadmasterError
from loadmaster.kernels import self_check, weights
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.backend import BlockSizes, SlotShape
from loadmaster.kernels.cpu import packed
from loadmaster.kernels.cpu.packed import PackedSlots
from loadmaster.kernels.cpu.row_blocks import SIZES_TO_TRY, compute_in_blocks
from loadmaster.kernels.grouped import ExpertWeights
from loadmaster.kernels.self_check import backend_fault, rows_fault
from loadmaster.kernels.torch_backend import TorchSlots

Maker = Callable[..., Any]
Change = Callable[[torch.Tensor], torch.Tensor]
SIZES = (16, 64)


@pytest.fixture(autouse=True)
def forget_verdicts() -> Iterator[None]:
    """What a cheat was found to be must outlive no test."""
    before = dict(self_check._FAULTS)
    yield
    self_check._FAULTS.clear()
    self_check._FAULTS.update(before)


def one_bit_more(row: torch.Tensor) -> torch.Tensor:
    """The next float32 up, in one number of a row: the least that a sum in another order does."""
    changed = row.clone()
    changed.view(torch.int32)[..., 3] += 1
    return changed


def few_rows(y: torch.Tensor) -> torch.Tensor:
    return one_bit_more(y) if len(y) < 4 else y


def many_rows(y: torch.Tensor) -> torch.Tensor:
    return one_bit_more(y) if len(y) > 40 else y


def one_place(y: torch.Tensor) -> torch.Tensor:
    return torch.cat((y[:37], one_bit_more(y[37:38]), y[38:])) if len(y) > 37 else y


def last_place(y: torch.Tensor) -> torch.Tensor:
    return torch.cat((y[:-1], one_bit_more(y[-1:]))) if len(y) > 1 else y


def its_neighbour(y: torch.Tensor) -> torch.Tensor:
    return torch.cat((y[:1], torch.where(y[:-1, :1] > 0, one_bit_more(y[1:]), y[1:])))


def sign_of_zero(y: torch.Tensor) -> torch.Tensor:
    zeroed = y.clone()
    zeroed[:, 0] = 0.0 if len(y) == 1 else -0.0
    return zeroed


@pytest.mark.parametrize(
    "cheat", [few_rows, many_rows, one_place, last_place, its_neighbour, sign_of_zero]
)
def test_one_bit_of_one_row_is_seen(cheat: Change) -> None:
    assert rows_fault(lambda x: x * 2, 8, torch.float32, SIZES) == ""
    fault = rows_fault(lambda x: cheat(x * 2), 8, torch.float32, SIZES)
    assert "has other bits than alone" in fault


@pytest.mark.parametrize("sizes", SIZES_TO_TRY)
def test_every_size_that_may_be_used_is_tried_whole(sizes: BlockSizes) -> None:
    """Each as a block of its own, not merely as what another size leaves over."""
    seen = []

    def compute(slot: int, block: torch.Tensor) -> torch.Tensor:
        seen.append(int((block != 0).any(dim=1).sum()))
        return block

    def rows(x: torch.Tensor) -> torch.Tensor:
        compute_in_blocks(x, [len(x)], sizes, compute, out := torch.empty_like(x))
        return out

    assert rows_fault(rows, 16, torch.float32, sizes) == ""
    assert set(sizes) <= set(seen)


@pytest.mark.parametrize("place", range(80))
def test_a_row_is_tried_at_every_place_of_every_block(place: int) -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        if len(y) > place:
            y[place] = one_bit_more(y[place : place + 1])
        return y

    assert rows_fault(compute, 8, torch.float32, SIZES) != ""


class UnpaddedSlots(TorchSlots):
    """A library left to itself: all rows of a slot in one call, however many."""

    name = "unpadded"

    def run(self, x_AH: torch.Tensor, count_S: torch.Tensor, out_AH: torch.Tensor) -> None:
        out_AH.copy_(self._block(0, x_AH))


def shape(hidden: int, intermediate: int, dtype: torch.dtype = torch.float32) -> SlotShape:
    return SlotShape(
        slots=1, hidden=hidden, intermediate=intermediate, dtype=dtype,
        device=torch.device("cpu"), activation=ExpertActivation("silu"), bias=False,
    )


def test_a_library_that_takes_other_code_for_single_rows_is_refused() -> None:
    """Not a cheat of ours: what this build of torch does on most processors."""
    wide = shape(256, 128)
    weight, x = torch.randn(256, 256), torch.randn(40, 256)
    alone = torch.cat([torch.mm(x[i : i + 1], weight.T) for i in range(40)])
    if torch.equal(alone, torch.mm(x, weight.T)):
        pytest.skip("on this processor single rows take no path of their own")
    assert "has other bits than alone" in backend_fault(UnpaddedSlots, wide, SIZES)
    assert backend_fault(TorchSlots, wide, SIZES) == ""


class CheatingSlots(PackedSlots):
    """Bits depend on the block's size, as where a library multiplies few rows its own way."""

    def _block(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return one_bit_more(y) if len(x) == 16 else y


class HopelessSlots(PackedSlots):
    """Bits depend on the place in a block, whatever its size."""

    def _block(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return torch.cat((y[:1], one_bit_more(y[1:])))


needs_packing = pytest.mark.skipif(
    not packed.packed_available(torch.float32), reason="oneDNN packs nothing on this processor"
)


def without_panels(monkeypatch: pytest.MonkeyPatch, backend: type[PackedSlots]) -> None:
    monkeypatch.setattr(weights, "panels_available", lambda dtype: False)
    monkeypatch.setattr(weights, "PackedSlots", backend)


@needs_packing
def test_sizes_that_disagree_are_given_up_and_the_backend_kept(
    layer_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_panels(monkeypatch, CheatingSlots)
    held: ExpertWeights = layer_of(2, 32, 16).weights()
    assert held.backend == "packed" and held._backend.block_sizes == (64, 256)
    assert held.refused[-1].startswith("experts, packed in blocks of 16, 64, 256 rows: row ")
    assert len(held.refused) == SIZES_TO_TRY.index((64, 256))


@needs_packing
def test_a_backend_that_cheats_is_refused_and_the_next_one_taken(
    layer_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_panels(monkeypatch, HopelessSlots)
    layer = layer_of(2, 32, 16)
    held: ExpertWeights = layer.weights()
    assert held.backend == "torch"
    refused = [fault for fault in held.refused if fault.startswith("experts, packed")]
    assert len(refused) == len(SIZES_TO_TRY)
    assert all("other bits than alone" in fault for fault in refused)
    with pytest.raises(LoadmasterError, match="no backend gives a row the same bits"):
        layer.weights("packed")


@needs_packing
def test_panels_follow_a_library_that_was_refused(
    layer_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with matrix units, where the library comes first."""
    layer = layer_of(2, 32, 16)
    if layer.weights().backend != "panels":
        pytest.skip("this processor fuses no products and sums")
    monkeypatch.setattr(weights, "panels_preferred", lambda *size: False)
    assert layer.weights().backend == "packed"
    monkeypatch.setattr(weights, "PackedSlots", HopelessSlots)
    held = layer.weights()
    assert held.backend == "panels" and len(held.refused) == len(SIZES_TO_TRY)


def test_where_nothing_keeps_the_bits_the_error_says_so(
    layer_of: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "backend_fault", lambda *given: "row 1 of 2 has other bits")
    with pytest.raises(LoadmasterError, match=r"experts of 32 x 16 in torch\.float32: no backend"):
        layer_of(2, 32, 16).weights()
    with pytest.raises(InputError, match="'packed' cannot run"):
        ExpertWeights.allocate(
            2, 32, 16, dtype=torch.float64, device="cpu", activation=ExpertActivation("silu"),
            backend="packed",
        )


def test_each_kind_of_expert_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(TorchSlots):
        def __init__(self, shape: SlotShape, sizes: BlockSizes) -> None:
            made.append(shape)
            super().__init__(shape, sizes)

    for slots in (1, 7):
        for hidden in (24, 32):
            several = SlotShape(**{**vars(shape(hidden, 16)), "slots": slots})
            assert backend_fault(Counted, several, SIZES) == ""
    assert [(s.slots, s.hidden) for s in made] == [(1, 24), (1, 32)]
