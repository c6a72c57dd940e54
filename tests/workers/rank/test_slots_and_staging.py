"""Experts in memory, and experts on their way: what arrives wrong is never served."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from loadmaster.errors import LoadmasterError
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.workers.protocol.transfers import Piece, Transfer, plan_rounds
from loadmaster.workers.rank.exchange import Exchange
from loadmaster.workers.rank.expert_store import ExpertStore
from loadmaster.workers.rank.model import ExpertShape, fingerprint
from loadmaster.workers.rank.staging import Staging, from_bytes, to_bytes
from loadmaster.workers.rank.weight_files import ExpertTensors

SHAPE = ExpertShape(8, 32, 16, ExpertActivation("silu"), False, False)
BIASED = ExpertShape(
    8, 32, 16, ExpertActivation("gptoss_clamped", 7.0, 1.7, interleaved=True), True, True
)


def expert(number: int, shape: ExpertShape = SHAPE) -> ExpertTensors:
    draw = torch.Generator().manual_seed(number)
    like = shape.empty_expert(torch.bfloat16)
    return {n: torch.randn(t.shape, generator=draw).bfloat16() for n, t in like.items()}


def store(numbers: list[int], shape: ExpertShape = SHAPE) -> ExpertStore:
    made = ExpertStore(lambda slots: shape.allocate(slots, torch.bfloat16))
    made.reserve(len(numbers))
    for number in numbers:
        made.put(number, expert(number, shape))
    return made


# ---- the store -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, BIASED])
def test_an_expert_comes_back_bit_for_bit(shape: ExpertShape) -> None:
    held = store([3, 5], shape)
    assert fingerprint(held.get(5)) == fingerprint(expert(5, shape))


def test_freed_slots_are_used_again_before_memory_grows() -> None:
    held = store([0, 1, 2])
    held.drop(1)
    held.put(7, expert(7))
    assert (held.experts, held.capacity) == ([0, 2, 7], 3)
    held.put(4, expert(4))
    assert (held.experts, held.capacity) == ([0, 2, 4, 7], 4)


def test_experts_in_several_blocks_compute_as_in_one() -> None:
    apart = store([0, 1])
    for number in (2, 3):
        apart.put(number, expert(number))
    whole = store([0, 1, 2, 3])
    rows = torch.randn(14, 32, generator=torch.Generator().manual_seed(9)).bfloat16()
    count = np.array([3, 0, 7, 4])
    assert torch.equal(apart.compute(rows, count), whole.compute(rows, count))


def test_gathered_experts_lie_in_one_block_and_compute_the_same() -> None:
    apart = store([5, 1])
    for number in (3, 0):
        apart.put(number, expert(number))
    apart.drop(1)
    assert apart.scattered_bytes == 3 * sum(t.nbytes for t in expert(0).values())
    apart.gather()
    assert (apart.experts, apart.capacity, apart.scattered_bytes) == ([0, 3, 5], 3, 0)
    assert apart.physical(np.array([5, 0, -1, 3])).tolist() == [2, 0, 0, 1]
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(9)).bfloat16()
    count = np.array([3, 2, 4])
    assert torch.equal(apart.compute(rows, count), store([0, 3, 5]).compute(rows, count))
    assert fingerprint(apart.get(5)) == fingerprint(expert(5))


def test_asking_for_an_expert_that_is_not_held_is_an_error() -> None:
    with pytest.raises(LoadmasterError, match=r"expert 4 is not held.*\[0, 1\]"):
        store([0, 1]).get(4)


# ---- staging -------------------------------------------------------------------------------


class TwoRanks:
    """Rank 0 holds experts 0 and 1, rank 1 holds 2 and 3, in one layer."""

    def __init__(self) -> None:
        shared = torch.distributed.HashStore()  # type: ignore[attr-defined]
        with ThreadPoolExecutor(2) as threads:
            self.exchanges = list(
                threads.map(lambda g: Exchange(shared, g, 2, timeout_s=5.0), range(2))
            )
        self.stores = [store([0, 1]), store([2, 3])]
        self.staging = [
            Staging([s], lambda: SHAPE.empty_expert(torch.bfloat16)) for s in self.stores
        ]
        self.expected = {(0, n): fingerprint(expert(n)) for n in range(4)}

    def run(self, transfers: list[Transfer], piece_bytes: int = 1000) -> list[Any]:
        rounds = plan_rounds(transfers, piece_bytes)
        with ThreadPoolExecutor(2) as threads:
            return list(
                threads.map(
                    lambda g: self.staging[g].run(rounds, self.exchanges[g], self.expected),
                    range(2),
                )
            )


SIZE = sum(t.nbytes for t in expert(0).values())
SWAP = [Transfer(0, 1, 0, 1, SIZE), Transfer(0, 2, 1, 0, SIZE)]


def test_bytes_survive_the_flattening() -> None:
    for shape in (SHAPE, BIASED):
        one = expert(4, shape)
        again = from_bytes(to_bytes(one), shape.empty_expert(torch.bfloat16))
        assert fingerprint(again) == fingerprint(one)


def test_experts_cross_in_pieces_and_match_their_fingerprints() -> None:
    ranks = TwoRanks()
    assert ranks.run(SWAP) == [([(0, 2)], []), ([(0, 1)], [])]
    assert [s.experts for s in ranks.stores] == [[0, 1, 2], [1, 2, 3]]
    assert [s.staged for s in ranks.staging] == [[(0, 2)], [(0, 1)]]
    assert [s.bytes for s in ranks.staging] == [0, 0]


def test_abort_leaves_no_trace() -> None:
    ranks = TwoRanks()
    ranks.run(SWAP)
    half = plan_rounds([Transfer(0, 3, 1, 0, SIZE)], 1000)[:2]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(
            lambda g: ranks.staging[g].run(half, ranks.exchanges[g], ranks.expected), range(2)
        ))
    assert ranks.staging[0].bytes == SIZE
    for staging in ranks.staging:
        staging.abort()
    assert [s.experts for s in ranks.stores] == [[0, 1], [2, 3]]
    assert [(s.staged, s.bytes) for s in ranks.staging] == [([], 0), ([], 0)]


def test_a_bit_that_flips_on_the_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    accept = Staging._accept
    for _ in range(20):
        ranks = TwoRanks()
        bit = int(rng.integers(0, 8 * SIZE))

        def flip(self: Staging, key: tuple[int, int], expected: str, bit: int = bit) -> bool:
            if key == (0, 1):
                self._incoming[key][bit // 8] ^= 1 << (bit % 8)
            return accept(self, key, expected)

        monkeypatch.setattr(Staging, "_accept", flip)
        assert ranks.run(SWAP) == [([(0, 2)], []), ([], [(0, 1)])]
        assert ranks.stores[1].experts == [2, 3]


def test_a_bit_that_flips_while_staged_is_found() -> None:
    ranks = TwoRanks()
    ranks.run(SWAP)
    wrong = expert(1)
    wrong["down"].view(torch.int16)[3, 3] ^= 1
    ranks.stores[1].put(1, wrong)
    assert ranks.staging[0].verify(ranks.expected) == []
    assert ranks.staging[1].verify(ranks.expected) == [(0, 1)]
    assert ranks.stores[1].experts == [2, 3]


def test_a_piece_names_its_bytes() -> None:
    """The rounds above really cut the expert: otherwise the tests would move it whole."""
    rounds = plan_rounds(SWAP, 1000)
    assert len(rounds) == -(-SIZE // 1000)
    assert Piece(SWAP[0], 0, 1000) in rounds[0]
