"""A rank's side of a plan switch: experts arrive piece by piece, are checked, and wait.

Knows expert tensors, their fingerprints and the exchange. Knows nothing of plans, epochs or why an
expert moves. Until `release` or a commit, what serves is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..protocol.transfers import Piece, Round
from .exchange import Exchange
from .expert_store import ExpertStore
from .model import fingerprint
from .weight_files import ExpertTensors

Key = tuple[int, int]      # (layer, expert)


def to_bytes(tensors: ExpertTensors) -> Tensor:
    """All tensors of an expert, in name order, as one run of bytes on the host."""
    parts = [tensors[n].contiguous().view(torch.uint8).flatten() for n in sorted(tensors)]
    return torch.cat(parts).cpu()


def from_bytes(data: Tensor, like: ExpertTensors) -> ExpertTensors:
    """The tensors that `to_bytes` flattened; `like` gives names, shapes and types."""
    tensors, start = {}, 0
    for name in sorted(like):
        part = data[start : start + like[name].nbytes]
        tensors[name] = part.view(like[name].dtype).view(like[name].shape)
        start += like[name].nbytes
    return tensors


class Staging:
    """Experts on their way in and out of one rank."""

    def __init__(
        self, stores: list[ExpertStore], like: Callable[[], ExpertTensors]
    ) -> None:
        """like: tensors of the right names, shapes and types (any values)."""
        self._stores = stores
        self._like = like
        self._outgoing: dict[Key, Tensor] = {}
        self._incoming: dict[Key, Tensor] = {}
        self._arrived_bytes: dict[Key, int] = {}
        self._staged: list[Key] = []

    @property
    def staged(self) -> list[Key]:
        """Experts that arrived whole and match their fingerprint, not yet committed."""
        return sorted(self._staged)

    @property
    def bytes(self) -> int:
        """Memory of half-arrived and half-sent experts."""
        buffers = [*self._outgoing.values(), *self._incoming.values()]
        return sum(b.nbytes for b in buffers)

    def run(
        self, rounds: Iterable[Round], exchange: Exchange, expected: dict[Key, str]
    ) -> tuple[list[Key], list[Key]]:
        """Carry these rounds' pieces. All ranks call this with the same rounds.

        expected: fingerprints of the experts that arrive here. Returns (experts staged now,
        experts that arrived corrupted and were thrown away).
        """
        staged: list[Key] = []
        corrupted: list[Key] = []
        for one in rounds:
            for key in self._run_round(one, exchange):
                if self._accept(key, expected[key]):
                    staged.append(key)
                else:
                    corrupted.append(key)
        return staged, corrupted

    def _run_round(self, one: Round, exchange: Exchange) -> list[Key]:
        """One round; returns the experts whose last piece arrived."""
        works = []
        for tag, piece in enumerate(one):
            if piece.transfer.source == exchange.rank:
                works.append(exchange.send(self._outgoing_part(piece), piece.transfer.target, tag))
            elif piece.transfer.target == exchange.rank:
                part = self._incoming_part(piece)
                works.append(exchange.receive(part, piece.transfer.source, tag))
        exchange.wait(works, "moving experts")
        whole = []
        for piece in one:
            key = (piece.transfer.layer, piece.transfer.expert)
            last = piece.offset_bytes + piece.size_bytes == piece.transfer.size_bytes
            if piece.transfer.source == exchange.rank and last:
                self._outgoing.pop(key, None)
            if piece.transfer.target == exchange.rank:
                self._arrived_bytes[key] = self._arrived_bytes.get(key, 0) + piece.size_bytes
                if self._arrived_bytes[key] == piece.transfer.size_bytes:
                    whole.append(key)
        return whole

    def _outgoing_part(self, piece: Piece) -> Tensor:
        key = (piece.transfer.layer, piece.transfer.expert)
        if key not in self._outgoing:
            self._outgoing[key] = to_bytes(self._stores[key[0]].get(key[1]))
        return self._outgoing[key][piece.offset_bytes : piece.offset_bytes + piece.size_bytes]

    def _incoming_part(self, piece: Piece) -> Tensor:
        key = (piece.transfer.layer, piece.transfer.expert)
        if key not in self._incoming:
            self._incoming[key] = torch.empty(piece.transfer.size_bytes, dtype=torch.uint8)
        return self._incoming[key][piece.offset_bytes : piece.offset_bytes + piece.size_bytes]

    def _accept(self, key: Key, expected: str) -> bool:
        """Store an expert that arrived whole, then check what the store gives back."""
        data = self._incoming.pop(key)
        del self._arrived_bytes[key]
        layer, expert = key
        self._stores[layer].put(expert, from_bytes(data, self._like()))
        if fingerprint(self._stores[layer].get(expert)) != expected:
            self._stores[layer].drop(expert)
            return False
        self._staged.append(key)
        return True

    def verify(self, expected: dict[Key, str]) -> list[Key]:
        """Staged experts whose bytes no longer match; they are thrown away."""
        wrong = [
            (layer, expert)
            for layer, expert in self.staged
            if fingerprint(self._stores[layer].get(expert)) != expected[layer, expert]
        ]
        for layer, expert in wrong:
            self._stores[layer].drop(expert)
            self._staged.remove((layer, expert))
        return wrong

    def commit(self) -> None:
        """What is staged now belongs to the tables."""
        self._clear()

    def abort(self) -> None:
        """Throw away everything that is staged or on its way."""
        for layer, expert in self._staged:
            self._stores[layer].drop(expert)
        self._clear()

    def _clear(self) -> None:
        self._staged.clear()
        self._outgoing.clear()
        self._incoming.clear()
        self._arrived_bytes.clear()
