"""Balance where replicas share an expert's tokens by a rule that is blind to load.

`even` and most engines' rules split an expert's tokens over all its replicas equally, or nearly so
over many tokens; `nearest` sends each home rank's tokens to the replicas nearest to it, equally;
SGLang's static table to the one on the rank, else to the first in its node where others lie
elsewhere, else to a fair choice; vllm-ascend's to the replica whose turn the rank is, so that three
replicas serve 3, 3 and 2 of eight ranks. Either way a device gets a share of the expert that
depends on who holds it, a sample's load is a sum of shares, and a move changes the shares of the
touched experts. A fair choice counts as equal shares: who draws which replica depends on every
expert before, which no search can know.

Knows loads per sample and expert, devices and their nodes. Homes count as spread evenly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ....foundation.arrays import FloatArray, SlotArray
from ....foundation.compiled import RandomState, compiled_part, compiled_part_inline
from ...cost.token_transfers import TransferModel
from .annealer import (
    Change,
    Found,
    Held,
    Moves,
    Overload,
    Schedule,
    SearchSpace,
    anneal,
    begin,
    commit,
    copy_rows,
    copy_values,
    most_loaded,
    overload_cost,
    prepare,
    try_sample,
)

ALIKE, NEAREST, FIRST_NEAR, IN_TURN = 0, 1, 2, 3       # how replicas share
MOVES = Moves(aimed=0.4, dearest=8, exchanged=0.7)


class Sharing(NamedTuple):
    """A rule, and what it looks at."""

    rule: int
    node_G: Any
    tensor_parallel: int       # ranks that are one data-parallel rank; 1 = every rank is one


class FixedShares(NamedTuple):
    """Shares of every expert, and what they make of every sample."""

    load_WE: Any        # [W, E]
    speed_G: Any
    overload: Overload
    rule: Sharing
    share_EG: Any       # [E, G] part of an expert's tokens that each device computes
    load_WG: Any        # [W, G]
    tried_WG: Any
    share_XG: Any       # [2, G] shares of e1, e2 after the change
    change_XG: Any      # [2, G] less those before it


def improve_fixed_shares(
    space: SearchSpace,
    load_WE: FloatArray,
    weight_W: FloatArray,
    slots_GC: SlotArray,
    schedule: Schedule,
    overload: Overload,
    transfers: TransferModel,
    state: RandomState,
    *,
    rule: int = ALIKE,
    node_G: npt.NDArray[np.int64] | None = None,
    tensor_parallel: int = 1,
) -> Found:
    """Anneal one layer's slots where replicas share as a rule says.

    load_WE [W, E]: every sample scaled so that perfect balance is 1 (its sum is the speeds' sum).
    node_G: where the rule asks what is near; None = one node.
    """
    (samples, experts), devices = load_WE.shape, len(slots_GC)
    objective = FixedShares(
        np.ascontiguousarray(load_WE, np.float64), space.speed_G, overload,
        Sharing(
            rule, np.zeros(devices, np.int64) if node_G is None else np.asarray(node_G, np.int64),
            tensor_parallel,
        ),
        np.zeros((experts, devices)), np.zeros((samples, devices)), np.zeros((samples, devices)),
        np.zeros((2, devices)), np.zeros((2, devices)),
    )
    return anneal(space, objective, weight_W, slots_GC, MOVES, schedule, transfers, state)


@begin.of(FixedShares)
def _begin(objective: FixedShares, held: Held, cost_W: Any) -> None:
    for e in range(len(objective.share_EG)):
        _shares(held, e, objective.rule, objective.share_EG[e])
    for w in range(len(cost_W)):
        for e in range(len(objective.share_EG)):
            for g in range(len(objective.speed_G)):
                objective.load_WG[w, g] += objective.load_WE[w, e] * objective.share_EG[e, g]
        cost_W[w] = _cost(objective, objective.load_WG[w])


@prepare.of(FixedShares)
def _prepare(objective: FixedShares, held: Held, change: Change) -> None:
    if change.e1 >= 0:
        _shares(held, change.e1, objective.rule, objective.share_XG[0])
        _less(objective.share_XG[0], objective.share_EG[change.e1], objective.change_XG[0])
    if change.e2 >= 0:
        _shares(held, change.e2, objective.rule, objective.share_XG[1])
        _less(objective.share_XG[1], objective.share_EG[change.e2], objective.change_XG[1])


@try_sample.of(FixedShares)
def _try_sample(objective: FixedShares, held: Held, change: Change, w: int) -> float:
    load_G, tried_G, change_XG = objective.load_WG[w], objective.tried_WG[w], objective.change_XG
    first = objective.load_WE[w, change.e1] if change.e1 >= 0 else 0.0
    second = objective.load_WE[w, change.e2] if change.e2 >= 0 else 0.0
    for g in range(len(load_G)):
        tried_G[g] = load_G[g] + first * change_XG[0, g] + second * change_XG[1, g]
    return _cost(objective, tried_G)


@commit.of(FixedShares)
def _commit(objective: FixedShares, held: Held, change: Change) -> None:
    if change.e1 >= 0:
        copy_values(objective.share_XG[0], objective.share_EG[change.e1])
    if change.e2 >= 0:
        copy_values(objective.share_XG[1], objective.share_EG[change.e2])
    copy_rows(objective.tried_WG, objective.load_WG)


@most_loaded.of(FixedShares)
def _most_loaded(objective: FixedShares, held: Held, w: int) -> int:
    fullest, highest = 0, -1.0
    for g in range(len(objective.speed_G)):
        level = objective.load_WG[w, g] / objective.speed_G[g]
        if level > highest:
            fullest, highest = g, level
    return fullest


@compiled_part_inline
def _cost(objective: FixedShares, load_G: Any) -> float:
    peak = 0.0
    for g in range(len(load_G)):
        peak = max(peak, load_G[g] / objective.speed_G[g])
    return overload_cost(objective.overload, peak)


@compiled_part
def _less(after_G: Any, before_G: Any, change_G: Any) -> None:
    for g in range(len(change_G)):
        change_G[g] = after_G[g] - before_G[g]


@compiled_part
def _shares(held: Held, e: int, sharing: Sharing, share_G: Any) -> None:
    """[G] the part of an expert's tokens each device computes; sums to 1."""
    for g in range(len(share_G)):
        share_G[g] = 0.0
    if sharing.rule == ALIKE:
        replicas, slot_R = held.replicas_E[e], held.slot_ER[e]
        for r in range(replicas):
            share_G[held.device_S[slot_R[r]]] = 1.0 / replicas
    elif sharing.rule == IN_TURN:
        _shares_in_turn(held, e, sharing.tensor_parallel, share_G)
    else:
        _shares_near(held, e, sharing.rule, sharing.node_G, share_G)


@compiled_part
def _shares_near(held: Held, e: int, rule: int, node_G: Any, share_G: Any) -> None:
    devices, replicas, slot_R = len(share_G), held.replicas_E[e], held.slot_ER[e]
    for home in range(devices):
        near, first, at_home = 0, devices, False
        for r in range(replicas):
            g = held.device_S[slot_R[r]]
            at_home |= g == home
            if node_G[g] == node_G[home]:
                near += 1
                first = min(first, g)
        if at_home:
            share_G[home] += 1.0 / devices
        elif rule == FIRST_NEAR and 0 < near < replicas:
            share_G[first] += 1.0 / devices
        else:
            # All, or under `nearest` those in the node: in one node that is the same.
            serving = near if near > 0 else replicas
            for r in range(replicas):
                g = held.device_S[slot_R[r]]
                if near == 0 or node_G[g] == node_G[home]:
                    share_G[g] += 1.0 / devices / serving


@compiled_part
def _shares_in_turn(held: Held, e: int, tensor_parallel: int, share_G: Any) -> None:
    devices, replicas, slot_R = len(share_G), held.replicas_E[e], held.slot_ER[e]
    for r in range(replicas):
        place = 0                      # among the expert's slots
        for other in range(replicas):
            place += slot_R[other] < slot_R[r]
        served = 0
        for home in range(devices):
            turn = home
            if tensor_parallel > 1:
                turn = home % tensor_parallel + home // tensor_parallel + e
            served += turn % replicas == place
        share_G[held.device_S[slot_R[r]]] += served / devices
