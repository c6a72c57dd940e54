"""What a placement sends: transfers per token over the links that cost, and how a move changes it.

A destination is a node or a rank, whichever the payload rule counts; each expert has the bit set of
its destinations. per_expert pays for every choice whose expert is not at home; per_node and
per_rank pay once for every destination a token visits beyond its home: the only one of each expert
that has one, and one more for each expert that no visited destination holds (the rule of
`dispatch/deduplicated.py`).

Knows a sample of tokens, homes and experts' destinations. Knows nothing of balance; the searches
add it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...foundation.compiled import compiled
from ..cluster import Cluster

MOST_DESTINATIONS = 62     # bits of a set of destinations
NEAR, FAR = 1.0 / 3.0, 1.0   # a copy inside a node against one between nodes
PER_EXPERT, ONCE_PER_PLACE = 0, 1


class TransferModel(NamedTuple):
    """Tokens whose transfers count; T = 0 means transfers cost nothing here."""

    ids_TK: Any          # [T, K] int32, -1 = choice that does not count
    home_T: Any          # [T] int64 home destination
    start_E: Any         # [E + 1] int64; tokens of expert e: token_A[start_E[e]:start_E[e + 1]]
    token_A: Any         # int32
    destination_G: Any   # [G] int64 destination of each device
    price_PP: Any        # [P, P] float64 price of a transfer, home to destination
    rule: int
    weight: float        # price of one copy per token, in units of imbalance


def no_transfers(devices: int) -> TransferModel:
    """A model under which transfers cost nothing."""
    return TransferModel(
        np.empty((0, 1), np.int32), np.empty(0, np.int64), np.zeros(1, np.int64),
        np.empty(0, np.int32), np.zeros(devices, np.int64), np.zeros((1, 1)), PER_EXPERT, 0.0,
    )


def transfers_cost_bytes(cluster: Cluster) -> bool:
    """Whether placement can save transfers on links that are scarce (design: `objective`)."""
    if cluster.traffic.mode != "return_home" or cluster.num_devices == 1:
        return False
    return cluster.num_nodes > 1 or cluster.traffic.payload == "per_rank"


def transfer_model(
    ids_TK: npt.NDArray[np.int32],
    home_T: npt.NDArray[np.integer[Any]],
    experts: int,
    cluster: Cluster,
    weight: float,
) -> TransferModel | None:
    """Transfers under the payload rule; None where they are free or destinations too many."""
    if not transfers_cost_bytes(cluster):
        return None
    by_rank = cluster.traffic.payload == "per_rank"
    node_G = cluster.node_G
    destination_G = np.arange(cluster.num_devices) if by_rank else node_G
    destinations = int(destination_G.max()) + 1
    if destinations > MOST_DESTINATIONS:
        return None
    node_P = node_G if by_rank else np.arange(destinations)
    price_PP = np.where(node_P[:, None] == node_P, NEAR, FAR)
    np.fill_diagonal(price_PP, 0.0)
    flat = ids_TK.reshape(-1)
    token = np.repeat(np.arange(len(ids_TK), dtype=np.int32), ids_TK.shape[1])[flat >= 0]
    order = np.argsort(flat[flat >= 0], kind="stable")
    counts_E = np.bincount(flat[flat >= 0], minlength=experts)
    return TransferModel(
        ids_TK, destination_G[home_T].astype(np.int64),
        np.concatenate(([0], np.cumsum(counts_E))).astype(np.int64), token[order],
        destination_G.astype(np.int64), price_PP,
        PER_EXPERT if cluster.traffic.payload == "per_expert" else ONCE_PER_PLACE, weight,
    )


@compiled
def token_price(model: TransferModel, t: int, destinations_E: Any) -> float:
    """What one token's transfers cost."""
    home = model.home_T[t]
    price = 0.0
    visited = 1 << home
    if model.rule == PER_EXPERT:
        for e in model.ids_TK[t]:
            if e >= 0 and not destinations_E[e] & visited:
                price += model.price_PP[home, _lowest(destinations_E[e])]
        return price
    for e in model.ids_TK[t]:
        if e >= 0 and destinations_E[e] & (destinations_E[e] - 1) == 0:
            visited |= destinations_E[e]
    for e in model.ids_TK[t]:
        if e >= 0 and not destinations_E[e] & visited:
            visited |= destinations_E[e] & -destinations_E[e]
    visited ^= 1 << home
    while visited:
        price += model.price_PP[home, _lowest(visited)]
        visited &= visited - 1
    return price


@compiled
def _lowest(bits: int) -> int:
    destination = 0
    while not (bits >> destination) & 1:
        destination += 1
    return destination


@compiled
def all_prices(model: TransferModel, destinations_E: Any) -> Any:
    """[T] price of every token."""
    price_T = np.zeros(len(model.home_T))
    for t in range(len(price_T)):
        price_T[t] = token_price(model, t, destinations_E)
    return price_T


@compiled
def price_change(
    model: TransferModel, destinations_E: Any, price_T: Any,
    e1: int, after1: int, e2: int, after2: int,
    commit: bool,
) -> float:
    """Change of cost when experts e1, e2 (or -1) get these sets of destinations; `commit` makes it
    so.

    Returns weight · change of the mean price. Tokens that chose both are counted once.
    """
    tokens = len(price_T)
    if tokens == 0:
        return 0.0
    before1 = destinations_E[e1] if e1 >= 0 else 0
    before2 = destinations_E[e2] if e2 >= 0 else 0
    if (e1 < 0 or before1 == after1) and (e2 < 0 or before2 == after2):
        return 0.0
    if e1 >= 0:
        destinations_E[e1] = after1
    if e2 >= 0:
        destinations_E[e2] = after2
    change = 0.0
    for which in range(2):
        e = e1 if which == 0 else e2
        if e < 0:
            continue
        for a in range(model.start_E[e], model.start_E[e + 1]):
            t = model.token_A[a]
            if which == 1 and e1 >= 0 and _chose(model.ids_TK[t], e1):
                continue
            price = token_price(model, t, destinations_E)
            change += price - price_T[t]
            if commit:
                price_T[t] = price
    if not commit:
        if e1 >= 0:
            destinations_E[e1] = before1
        if e2 >= 0:
            destinations_E[e2] = before2
    return change * model.weight / tokens


@compiled
def _chose(ids_K: Any, expert: int) -> bool:
    for e in ids_K:
        if e == expert:
            return True
    return False
