"""Whether live ranks dispatch as the planner does: a section of the house's benchmark.

    python benchmarks/house_dispatch.py [--json]

dispatch_agrees   1,000 random cases (plan, step, payload, policy; every fourth under a capacity
                  rule): the slots that ranks choose over a real exchange, each from its own
                  tokens, against the planner's for the whole step, assignment by assignment.

`payload_blind` shows what is at stake: the same steps of `balanced` under per_rank, dispatched as
if tokens travelled once per expert.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.policies import POLICIES
from loadmaster.placement.dispatch.quotas import route
from loadmaster.placement.dispatch.token_limit import CapacityRule, apply_capacity
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.workers.protocol.phase_plans import Tables
from loadmaster.workers.protocol.settings import SERVED_TRAFFIC
from loadmaster.workers.rank import token_limit
from loadmaster.workers.rank.dispatch import LiveDispatch
from loadmaster.workers.rank.exchange import Exchange

CASES, SEED, RANKS = 1000, 14, (2, 4, 8)
RULES = (
    CapacityRule("drop", 0.8), CapacityRule("reroute", 0.8), CapacityRule("drop", 0.8, "device"),
)

Array = npt.NDArray[Any]
distributed: Any = torch.distributed


def dispatch_agrees(cases: int = CASES) -> dict[str, Any]:
    """The section's figures."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    pairs = [(policy, traffic) for policy in POLICIES for traffic in SERVED_TRAFFIC]
    found = dict.fromkeys(
        ("assignments", "assignments_differing", "cases_differing", "transfers_planned",
         "transfers_live", "ranks_with_other_quotas"), 0,
    )
    blind = np.zeros(4, np.int64)       # assignments, elsewhere, transfers, transfers if blind
    with ExitStack() as groups:
        threads = {n: groups.enter_context(ThreadPoolExecutor(n)) for n in RANKS}
        members = {n: _meet(n, threads[n]) for n in RANKS}
        for case in range(cases):
            policy, traffic = pairs[case % len(pairs)]
            rule = RULES[case // len(pairs) % len(RULES)] if case % 4 == 3 else None
            step = _Case.draw(rng, policy, traffic, rule)
            run = partial(_together, threads[step.ranks])
            live_TK, quotas = step.live(members[step.ranks], run)
            ids_TK, planned_TK = step.planned()
            sent_GS = _sent(planned_TK, step.home_T, step.plan.slots[0].shape)
            differing = int((live_TK != planned_TK).sum())
            found["assignments"] += int((ids_TK >= 0).sum())
            found["assignments_differing"] += differing
            found["cases_differing"] += differing > 0
            found["ranks_with_other_quotas"] += sum(not np.array_equal(q, sent_GS) for q in quotas)
            found["transfers_planned"] += step.transfers(planned_TK)
            found["transfers_live"] += step.transfers(live_TK)
            if policy == "balanced" and traffic == "return_home/per_rank":
                other_TK = step.payload_blind(ids_TK)
                blind += (int((ids_TK >= 0).sum()), int((other_TK != planned_TK).sum()),
                          step.transfers(planned_TK), step.transfers(other_TK))
        for group in members.values():
            for exchange in group:
                exchange.close()
    return {
        "cases": cases, "seed": SEED, "ranks": list(RANKS), "policies": list(POLICIES),
        "traffic": list(SERVED_TRAFFIC), **found,
        "payload_blind": {
            "assignments_elsewhere_share": float(blind[1] / blind[0]),
            "transfers_ratio": float(blind[3] / blind[2]),
        },
        "target": "0 cases differ",
        "holds": found["cases_differing"] == 0 and found["ranks_with_other_quotas"] == 0,
    }


class _Case:
    """One plan of one layer, one step of tokens, one cluster, maybe a capacity rule."""

    def __init__(
        self, plan: Plan, cluster: Cluster, ids_TK: Array, home_T: Array, score_TE: Array,
        rule: CapacityRule | None,
    ) -> None:
        self.plan, self.cluster, self.rule = plan, cluster, rule
        self.ids_TK, self.home_T, self.score_TE = ids_TK, home_T, score_TE
        self.gates_TK = np.where(
            ids_TK >= 0, np.take_along_axis(score_TE, np.maximum(ids_TK, 0), axis=1), 0
        )
        self.ranks = cluster.num_devices

    @classmethod
    def draw(
        cls, rng: np.random.Generator, policy: str, traffic: str, rule: CapacityRule | None
    ) -> _Case:
        ranks, experts = int(rng.choice(RANKS)), int(rng.integers(4, 65))
        width = -(-experts // ranks) + int(rng.integers(0, 5))
        spare = rng.integers(-1, experts, ranks * width - experts)
        slots = rng.permutation(np.r_[np.arange(experts), spare]).reshape(1, ranks, width)
        slack = {"slack": float(rng.choice([0.0, 0.05, 0.5]))}
        spec = DispatchSpec(
            policy=policy,
            parameters=slack if policy == "balanced" and rng.random() < 0.3 else {},
        )
        nodes = int(rng.choice([n for n in (1, 2, 4) if n <= ranks]))
        cluster = Cluster.preset(
            "cpu", nodes=nodes, devices_per_node=ranks // nodes, slots_per_device=width,
            traffic=traffic,
            speeds=rng.choice([0.5, 1.0], ranks).tolist() if rng.random() < 0.2 else None,
        )
        tokens, choices = int(rng.integers(1, 513)), int(rng.integers(1, min(8, experts) + 1))
        taste_TE = rng.normal(0, 1.0, experts) + rng.gumbel(size=(tokens, experts))
        ids = np.argsort(-taste_TE, axis=1)[:, :choices].astype(np.int64)
        ids[rng.random(ids.shape) < 0.02] = -1
        home = rng.choice(ranks, tokens, p=rng.dirichlet(np.full(ranks, 3.0)))
        if rule is not None:
            home.sort()      # the order in which a rule sees the tokens of all ranks
        score = np.exp(taste_TE - taste_TE.max(axis=1, keepdims=True))
        score /= score.sum(axis=1, keepdims=True)
        plan = Plan(slots=slots.astype(np.int16), num_experts=experts, dispatch=spec)
        return cls(plan, cluster, ids, home, score.astype(np.float32), rule)

    def live(
        self, members: Sequence[Exchange], run: Callable[[list[Callable[[], Any]]], list[Any]]
    ) -> tuple[Array, list[Array]]:
        """(slots [T, K], every rank's quotas), as the ranks' expert layers find them."""
        tables = Tables.of(self.plan, epoch=1)
        found = run([
            partial(self._rank, exchange, LiveDispatch(exchange, tables, self.cluster))
            for exchange in members
        ])
        slot_TK = np.empty(self.ids_TK.shape, np.int64)
        for g, (slots, _) in enumerate(found):
            slot_TK[self.home_T == g] = slots
        return slot_TK, [quotas for _, quotas in found]

    def _rank(self, exchange: Exchange, live: LiveDispatch) -> tuple[Array, Array]:
        own = self.home_T == exchange.rank
        ids = torch.from_numpy(self.ids_TK[own])
        if self.rule is not None:
            ids = token_limit.limit(
                exchange, self.rule, ids, torch.from_numpy(self.gates_TK[own]),
                torch.from_numpy(self.score_TE[own]), self.plan.slots[0], self.plan.num_experts,
            ).ids_TK
        sent = live.assign(0, 0, 0, ids)
        return sent.slot_TK.numpy(), sent.quota_GS

    def planned(self) -> tuple[Array, Array]:
        """(ids kept [T, K], their slots), from the whole step at once."""
        ids = self.ids_TK
        if self.rule is not None:
            experts = np.arange(self.plan.num_experts)
            ids = apply_capacity(
                ids, self.gates_TK, len(experts), self.rule, score_TE=self.score_TE,
                home_T=self.home_T,
                holds_GE=np.stack([np.isin(experts, row) for row in self.plan.slots[0]]),
            ).ids_TK
        return ids, self._routed(ids, self.cluster)

    def payload_blind(self, ids_TK: Array) -> Array:
        """Slots under the rule for tokens that travel once per expert."""
        other = Cluster.preset(
            "cpu", nodes=self.cluster.num_nodes,
            devices_per_node=self.ranks // self.cluster.num_nodes,
            slots_per_device=self.plan.slots_per_device,
            speeds=self.cluster.speed_G.tolist(),
        )
        return self._routed(ids_TK, other)

    def _routed(self, ids_TK: Array, cluster: Cluster) -> Array:
        return route(ids_TK, self.home_T, self.plan.slots[0], cluster, self.plan.dispatch,
                     self.plan.num_experts)

    def transfers(self, slot_TK: Array) -> int:
        """Rows sent to other ranks under the case's payload."""
        rank_TK = np.where(slot_TK >= 0, slot_TK // self.plan.slots_per_device, -1)
        away_TK = (rank_TK >= 0) & (rank_TK != self.home_T[:, None])
        if self.cluster.traffic.payload == "per_expert":
            return int(away_TK.sum())
        visited_TG = np.zeros((len(rank_TK), self.ranks), bool)
        token, choice = np.nonzero(away_TK)
        visited_TG[token, rank_TK[token, choice]] = True
        return int(visited_TG.sum())


def _sent(slot_TK: Array, home_T: Array, shape: tuple[int, ...]) -> Array:
    """[G, S] rows from each home rank to each slot."""
    sent_GS = np.zeros((shape[0], shape[0] * shape[1]), np.int64)
    token, choice = np.nonzero(slot_TK >= 0)
    np.add.at(sent_GS, (home_T[token], slot_TK[token, choice]), 1)
    return sent_GS


def _meet(ranks: int, threads: ThreadPoolExecutor) -> list[Exchange]:
    store = distributed.HashStore()
    return _together(
        threads, [partial(Exchange, store, g, ranks, timeout_s=60.0) for g in range(ranks)]
    )


def _together(threads: ThreadPoolExecutor, functions: list[Callable[[], Any]]) -> list[Any]:
    """Run one function per rank at the same time."""
    return [answer.result() for answer in [threads.submit(f) for f in functions]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    found = {"dispatch_agrees": dispatch_agrees()}
    print(json.dumps(found) if options.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
