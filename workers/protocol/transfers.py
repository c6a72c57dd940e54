"""Which bytes go from which rank to which, and when: a plan switch as rounds of transfers.

Pure decisions over plans. Knows nothing of tensors, networks or Ray. Equal inputs give equal
rounds: no clock, no randomness, sorted iteration.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ...errors import InfeasibleError


@dataclass(frozen=True, order=True)
class Transfer:
    """One expert's weights on their way from a rank that holds them to one that will."""

    layer: int
    expert: int
    source: int
    target: int
    size_bytes: int


@dataclass(frozen=True, order=True)
class Piece:
    """A run of bytes of one transfer."""

    transfer: Transfer
    offset_bytes: int
    size_bytes: int


# Pieces that travel at the same time: no rank is in two pairs of one round.
Round = tuple[Piece, ...]


def plan_transfers(
    held_LG: list[list[frozenset[int]]], wanted_LG: list[list[frozenset[int]]], expert_bytes: int
) -> list[Transfer]:
    """Every (layer, rank, expert) that is wanted and not held there, with a source.

    held_LG, wanted_LG: experts of each rank, by layer. Among holders the one that has been given
    the fewest bytes to send goes, ties to the lower rank. Raises InfeasibleError for an expert
    that no rank holds (it must come from the checkpoint).
    """
    sent_bytes: dict[int, int] = defaultdict(int)
    transfers = []
    for layer, row in enumerate(wanted_LG):
        for rank, wanted in enumerate(row):
            for expert in sorted(wanted - held_LG[layer][rank]):
                holders = [g for g, held in enumerate(held_LG[layer]) if expert in held]
                if not holders:
                    raise InfeasibleError(
                        f"no rank holds expert {expert} of layer {layer}: rehydrate it from the "
                        "checkpoint first"
                    )
                source = min(holders, key=lambda g: (sent_bytes[g], g))
                sent_bytes[source] += expert_bytes
                transfers.append(Transfer(layer, expert, source, rank, expert_bytes))
    return transfers


def plan_rounds(transfers: list[Transfer], piece_bytes: int) -> list[Round]:
    """Order transfers into rounds in which a rank talks to one peer at a time.

    A round carries at most `piece_bytes` each way between the two ranks of a pair; what is larger
    goes on in later rounds. The pair with the most left to carry goes first, ties to lower ranks.
    """
    waiting: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for transfer in sorted(transfers):
        key = (transfer.source, transfer.target)
        for offset in range(0, transfer.size_bytes, piece_bytes):
            size = min(piece_bytes, transfer.size_bytes - offset)
            waiting[key].append(Piece(transfer, offset, size))
    left = {key: sum(p.size_bytes for p in pieces) for key, pieces in waiting.items()}
    rounds: list[Round] = []
    while any(left.values()):
        rounds.append(_one_round(waiting, left, piece_bytes))
    return rounds


def _one_round(
    waiting: dict[tuple[int, int], list[Piece]], left: dict[tuple[int, int], int], piece_bytes: int
) -> Round:
    pairs: dict[tuple[int, int], int] = defaultdict(int)
    for (a, b), size in left.items():
        pairs[min(a, b), max(a, b)] += size
    busy: set[int] = set()
    chosen: list[Piece] = []
    for a, b in sorted(pairs, key=lambda pair: (-pairs[pair], pair)):
        if not pairs[a, b] or busy & {a, b}:
            continue
        busy |= {a, b}
        for key in ((a, b), (b, a)):
            room = piece_bytes
            while waiting.get(key) and waiting[key][0].size_bytes <= room:
                piece = waiting[key].pop(0)
                room -= piece.size_bytes
                left[key] -= piece.size_bytes
                chosen.append(piece)
    return tuple(chosen)


def pack_steps(rounds: list[Round], budget_bytes: int) -> list[tuple[Round, ...]]:
    """Rounds grouped by step: the busiest rank of a step sends or receives at most the budget.

    A step always takes at least one round.
    """
    steps: list[tuple[Round, ...]] = []
    current: list[Round] = []
    used: dict[tuple[int, str], int] = defaultdict(int)
    for one in rounds:
        extra: dict[tuple[int, str], int] = defaultdict(int)
        for piece in one:
            extra[piece.transfer.source, "out"] += piece.size_bytes
            extra[piece.transfer.target, "in"] += piece.size_bytes
        if current and any(used[k] + n > budget_bytes for k, n in extra.items()):
            steps.append(tuple(current))
            current, used = [], defaultdict(int)
        current.append(one)
        for key, size in extra.items():
            used[key] += size
    if current:
        steps.append(tuple(current))
    return steps
