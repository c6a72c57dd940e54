"""A plan switch as rounds: every byte once, one peer at a time, a budget per step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.errors import InfeasibleError
from loadmaster.workers.protocol.transfers import (
    Piece,
    Transfer,
    pack_steps,
    plan_rounds,
    plan_transfers,
)


@st.composite
def transfers(draw: st.DrawFn) -> list[Transfer]:
    ranks = draw(st.integers(2, 5))
    found = {}
    for number in range(draw(st.integers(0, 12))):
        source = draw(st.integers(0, ranks - 1))
        target = draw(st.integers(0, ranks - 2))
        target += target >= source
        size = draw(st.integers(1, 40))
        found[number] = Transfer(0, number, source, target, size)
    return list(found.values())


@given(transfers(), st.integers(1, 50))
def test_every_byte_travels_once_and_in_order(moves: list[Transfer], piece_bytes: int) -> None:
    pieces = [p for one in plan_rounds(moves, piece_bytes) for p in one]
    for move in moves:
        mine = [p for p in pieces if p.transfer == move]
        assert [p.offset_bytes for p in mine] == sorted(p.offset_bytes for p in mine)
        covered = [b for p in mine for b in range(p.offset_bytes, p.offset_bytes + p.size_bytes)]
        assert covered == list(range(move.size_bytes))


@given(transfers(), st.integers(1, 50))
def test_in_a_round_a_rank_has_one_peer_and_no_more_than_a_piece_each_way(
    moves: list[Transfer], piece_bytes: int
) -> None:
    for one in plan_rounds(moves, piece_bytes):
        assert one
        peers: dict[int, set[int]] = {}
        sent: dict[tuple[int, int], int] = {}
        for piece in one:
            a, b = piece.transfer.source, piece.transfer.target
            peers.setdefault(a, set()).add(b)
            peers.setdefault(b, set()).add(a)
            sent[a, b] = sent.get((a, b), 0) + piece.size_bytes
        assert all(len(p) == 1 for p in peers.values())
        assert all(n <= piece_bytes for n in sent.values())


@given(transfers(), st.integers(1, 20), st.integers(20, 100))
def test_a_step_keeps_to_the_budget(
    moves: list[Transfer], piece_bytes: int, budget_bytes: int
) -> None:
    rounds = plan_rounds(moves, piece_bytes)
    steps = pack_steps(rounds, budget_bytes)
    assert [r for s in steps for r in s] == rounds
    for rounds_of_step in steps:
        out: dict[int, int] = {}
        for piece in (p for one in rounds_of_step for p in one):
            out[piece.transfer.source] = out.get(piece.transfer.source, 0) + piece.size_bytes
        assert max(out.values()) <= budget_bytes


def sets(*rows: tuple[int, ...]) -> list[list[frozenset[int]]]:
    """One layer's experts by rank."""
    return [[frozenset(r) for r in rows]]


def test_only_what_a_rank_lacks_moves_and_senders_take_turns() -> None:
    held = sets((0, 1), (0, 2), (3,))
    assert plan_transfers(held, sets((0, 1), (2, 3), (0, 3)), 10) == [
        Transfer(0, 3, 2, 1, 10), Transfer(0, 0, 0, 2, 10)
    ]
    # Expert 0 may come from rank 0 or 1; rank 1 sends expert 2 to rank 0 before.
    assert plan_transfers(held, sets((0, 1, 2), (2, 3), (0, 2, 3)), 10) == [
        Transfer(0, 2, 1, 0, 10), Transfer(0, 3, 2, 1, 10), Transfer(0, 0, 0, 2, 10),
        Transfer(0, 2, 1, 2, 10),
    ]


def test_an_expert_nobody_holds_is_an_error() -> None:
    with pytest.raises(InfeasibleError, match=r"expert 2 of layer 0.*checkpoint"):
        plan_transfers(sets((0,), (1,)), sets((0, 1), (2,)), 10)


def test_a_large_expert_goes_in_pieces() -> None:
    move = Transfer(0, 0, 0, 1, 25)
    assert plan_rounds([move], 10) == [
        (Piece(move, 0, 10),), (Piece(move, 10, 10),), (Piece(move, 20, 5),)
    ]
