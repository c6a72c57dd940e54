"""The bytes between ranks: one gloo group, its collectives, and a layer's way there and back.

Knows tensors, ranks and epochs. Knows nothing of models, plans' making, requests or Ray. A failed
collective is raised at once as `ExchangeError`; the group is then dead and must be rebuilt.

Axes: G ranks, A assignments (rows sent or received), H hidden.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor

from ...foundation.arrays import IntArray
from ..protocol.step_messages import EpochMismatchError, ExchangeError

_HEADER = 4      # epoch and step, as int32 words

# torch.distributed declares little of what it offers.
distributed: Any = torch.distributed


class Rendezvous:
    """Where the ranks of one group meet: a store that one of them hosts, on one address only."""

    def __init__(self, store: Any, host: str, port: int) -> None:
        self.store, self.host, self.port = store, host, port

    @classmethod
    def open(cls, host: str) -> Rendezvous:
        """Host a store on a free port of `host`; nothing listens on other addresses."""
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.bind((host, 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        return cls(_tcp_store(host, port, listener.detach()), host, port)

    @classmethod
    def find(cls, host: str, port: int) -> Rendezvous:
        """Meet at the store another rank hosts."""
        return cls(_tcp_store(host, port, None), host, port)


def _tcp_store(host: str, port: int, listen_fd: int | None) -> Any:
    try:
        return distributed.TCPStore(
            host,
            port,
            is_master=listen_fd is not None,
            timeout=timedelta(seconds=30),
            wait_for_workers=False,
            master_listen_fd=listen_fd,
        )
    except RuntimeError as error:
        raise ExchangeError(f"cannot meet the other ranks at {host}:{port}: {error}") from error


class Exchange:
    """One rank's membership in a gloo group. Not for use by two threads at once."""

    def __init__(
        self, store: Any, rank: int, ranks: int, *, timeout_s: float, host: str = "127.0.0.1"
    ) -> None:
        """store: one that all ranks of this group, and no others, share. host: own address."""
        self.rank, self.ranks = rank, ranks
        options = distributed.ProcessGroupGloo._Options()
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=timeout_s)
        try:
            self._members: Any = distributed.ProcessGroupGloo(store, rank, ranks, options)
        except RuntimeError as error:
            raise self._failed("joining the group", error) from error

    @classmethod
    def meet(
        cls, at: Rendezvous, generation: str, rank: int, ranks: int, *, timeout_s: float, host: str
    ) -> Exchange:
        """Join the group of this generation; a late member of an older one finds nobody."""
        store = distributed.PrefixStore(f"generation-{generation}", at.store)
        return cls(store, rank, ranks, timeout_s=timeout_s, host=host)

    def close(self) -> None:
        """Leave the group; peers that still wait in a collective fail."""
        group, self._members = self._members, None      # its sockets close with it
        if group is not None:
            group.abort()

    @property
    def _group(self) -> Any:
        group = self._members
        if group is None:
            raise ExchangeError(f"rank {self.rank} has left the group")
        return group

    def all_gather(self, row: Tensor) -> Tensor:
        """[n] on every rank -> [G, n]."""
        out = row.new_empty(self.ranks, *row.shape)
        try:
            self._group._allgather_base(out, row[None]).wait()
        except RuntimeError as error:
            raise self._failed("all-gather", error) from error
        return out

    def all_to_all(self, rows: Tensor, send_G: list[int], receive_G: list[int]) -> Tensor:
        """Rows, sorted by destination, to their destinations; what arrives is sorted by source.

        send_G and receive_G: rows to and from each rank; send_G sums to len(rows).
        """
        out = rows.new_empty(sum(receive_G), *rows.shape[1:])
        try:
            self._group.alltoall_base(out, rows.contiguous(), receive_G, send_G).wait()
        except RuntimeError as error:
            raise self._failed("all-to-all", error) from error
        return out

    def send(self, tensor: Tensor, peer: int, tag: int) -> Any:
        """Start sending to one peer; `.wait()` on the result."""
        return self._group.send([tensor], peer, tag)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Any:
        """Start receiving from one peer; `.wait()` on the result."""
        return self._group.recv([tensor], peer, tag)

    def wait(self, works: list[Any], what: str) -> None:
        """Finish sends and receives."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: RuntimeError) -> ExchangeError:
        # gloo: "[file:line] what happened. advice": the middle is what helps.
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1].split(". ")[0][:120]
        return ExchangeError(f"rank {self.rank}: {what} failed: {reason}")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a layer's way back needs to undo its way there; good for one step and epoch only."""

    send_G: list[int]         # assignments this rank sent to each rank
    receive_G: list[int]      # and got from each
    order_A: Tensor           # received row -> its place in physical order


def agree(
    exchange: Exchange, epoch: int, step: int, count_X: npt.NDArray[np.int32], *, first: int
) -> npt.NDArray[np.int32]:
    """All ranks' counts [G, X], after checking that all are in the same epoch and step.

    first: how many counts travel with epoch and step; where there are more, the rest follows in a
    second gather. How many there are depends on the plan, so they are not gathered before all
    ranks are known to be under the same one.
    Raises EpochMismatchError on every rank, before any token is sent.
    """
    row = np.zeros(_HEADER + first, np.int32)
    row[:_HEADER] = np.array([epoch, step], np.int64).view(np.int32)
    row[_HEADER : _HEADER + len(count_X)] = count_X[:first]
    table = exchange.all_gather(torch.from_numpy(row)).numpy()
    met = np.ascontiguousarray(table[:, :_HEADER]).view(np.int64)
    if (met != met[0]).any():
        each = ", ".join(f"rank {g}: epoch {e} step {s}" for g, (e, s) in enumerate(met))
        raise EpochMismatchError(f"ranks met with different plans or steps active ({each})")
    counts = table[:, _HEADER : _HEADER + len(count_X)]
    if len(count_X) > first:
        rest = exchange.all_gather(torch.from_numpy(count_X[first:])).numpy()
        counts = np.concatenate((counts, rest), axis=1)
    return np.ascontiguousarray(counts)


def send_tokens(
    exchange: Exchange,
    x_TH: Tensor,
    assignment_A: Tensor,
    choices: int,
    quota_GS: npt.NDArray[np.int32],
    physical_C: IntArray,
    *,
    payload: str,
) -> tuple[Tensor, Receipt, int]:
    """The tokens' way to their experts.

    assignment_A: this rank's assignments (flat t * K + k) sorted by global slot. choices: K.
    quota_GS: every rank's quotas, as all ranks computed them. physical_C: where each of this
    rank's slots is in its own memory. payload: `per_expert` sends a token once per choice,
    `per_rank` once per destination rank, where it is copied for its experts.
    Returns the rows to compute, in physical order; the receipt; rows sent to other ranks.
    """
    ranks, slots = exchange.ranks, quota_GS.shape[1] // exchange.ranks
    quota_GGC = quota_GS.reshape(ranks, ranks, slots)
    send_G = quota_GGC[exchange.rank].sum(axis=1).tolist()
    count_GC = quota_GGC[:, exchange.rank]
    receive_G = count_GC.sum(axis=1).tolist()
    token_A = torch.div(assignment_A, max(choices, 1), rounding_mode="floor")
    if payload == "per_rank":
        rows, remote = _send_once_per_rank(exchange, x_TH, token_A, send_G, receive_G)
    else:
        rows = exchange.all_to_all(x_TH[token_A], send_G, receive_G)
        remote = sum(send_G) - send_G[exchange.rank]
    order_A = _physical_order(count_GC, physical_C)
    receipt = Receipt(send_G=send_G, receive_G=receive_G, order_A=order_A)
    return rows[order_A], receipt, remote


def return_tokens(exchange: Exchange, y_AH: Tensor, receipt: Receipt) -> Tensor:
    """The results' way home: one row per assignment, in the order `assignment_A` had.

    Results always travel per assignment, in every payload: a sum made on the way would follow the
    placement, and with it the last bit of the output.
    """
    back = torch.empty_like(y_AH)
    back[receipt.order_A] = y_AH
    return exchange.all_to_all(back, receipt.receive_G, receipt.send_G)


def _physical_order(count_GC: npt.NDArray[np.int32], physical_C: IntArray) -> Tensor:
    """Received rows lie by (source, slot); the order that puts them by (physical slot, source)."""
    block = np.argsort(np.tile(physical_C, len(count_GC)), kind="stable")
    count = count_GC.reshape(-1).astype(np.int64)
    start = np.concatenate(([0], np.cumsum(count)[:-1]))
    taken = count[block]
    offset = np.repeat(start[block] - np.concatenate(([0], np.cumsum(taken)[:-1])), taken)
    return torch.from_numpy(offset + np.arange(int(count.sum())))


def _send_once_per_rank(
    exchange: Exchange, x_TH: Tensor, token_A: Tensor, send_G: list[int], receive_G: list[int]
) -> tuple[Tensor, int]:
    """Send each token once to each rank that computes it; give the rows one per assignment.

    Two small exchanges go ahead: how many distinct tokens, and which of them each assignment is.
    """
    blocks, transfers, indices = [], [], []
    for part in torch.split(token_A, send_G):
        distinct, index = torch.unique(part, return_inverse=True)
        blocks.append(distinct)
        indices.append(index)
        transfers.append(len(distinct))
    transfers_GG = exchange.all_gather(torch.tensor(transfers, dtype=torch.int64))
    arriving = transfers_GG[:, exchange.rank].tolist()
    index_A = exchange.all_to_all(torch.cat(indices), send_G, receive_G)
    rows = exchange.all_to_all(x_TH[torch.cat(blocks)], transfers, arriving)
    source_A = torch.repeat_interleave(torch.arange(exchange.ranks), torch.tensor(receive_G))
    start_G = torch.tensor([0, *np.cumsum(arriving)[:-1].tolist()])
    return rows[index_A + start_G[source_A]], sum(transfers) - transfers[exchange.rank]
