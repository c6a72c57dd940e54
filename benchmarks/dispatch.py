"""What splitting a step's tokens costs and how flat it comes out.

    python benchmarks/dispatch.py [--json] [--only one_node four_nodes]

One layer of the `a320` family (256 experts, zipf 1.0, 320 slots on 32 devices), 8,192 tokens of
top-8, the plan made on the family's load, the steps drawn from the same shares. One core, CPU
milliseconds: median of repeats per step, mean over steps and three seeds; compilation excluded and
given apart. `lp_ratio` is the busiest device over the fractional optimum of the step (HiGHS), worst
over all steps. In `four_nodes` tokens know their source node and stay in it where balance allows.
Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import linprog

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.assignment import layer_dispatch
from loadmaster.placement.dispatch.quotas import count_tokens, split
from loadmaster.placement.methods.eplb import eplb
from loadmaster.placement.plan import DispatchSpec
from loadmaster.traces.synth.generate import instance

TOKENS, TOP_K, EXPERTS, SLOTS, DEVICES = 8192, 8, 256, 320, 32
SEEDS, STEPS, REPEATS = (0, 1, 2), 4, 15

Array = npt.NDArray[Any]


def dispatch(only: tuple[str, ...] = ("one_node", "four_nodes")) -> dict[str, Any]:
    """The section's figures."""
    found: dict[str, Any] = {
        "tokens": TOKENS, "top_k": TOP_K, "experts": EXPERTS, "slots": SLOTS, "devices": DEVICES,
        "seeds": len(SEEDS), "steps_per_seed": STEPS,
        "first_call_s": _first_call_s(),
    }
    cases = [_case(seed) for seed in SEEDS]
    for name, nodes in (("one_node", 1), ("four_nodes", 4)):
        if name in only:
            found[name] = _measure(cases, nodes)
    return found


def _case(seed: int) -> tuple[Array, list[Array], Array]:
    """(slots [G, C], ids of some steps [T, K], home rank of every token)."""
    load_E = instance("a320", 1.0, seed).load_LE[0].astype(np.float64)
    maps = eplb(load_E[None], SLOTS, 1, 1, DEVICES)
    slots = maps.physical_to_logical_LS[0].reshape(DEVICES, -1).astype(np.int16)
    rng = np.random.default_rng(seed)
    log_share = np.log(load_E / load_E.sum())
    steps = [
        np.argpartition(-(log_share + rng.gumbel(size=(TOKENS, EXPERTS))), TOP_K, axis=1)[:, :TOP_K]
        .astype(np.int32)
        for _ in range(STEPS)
    ]
    return slots, steps, np.repeat(np.arange(DEVICES), TOKENS // DEVICES).astype(np.int32)


def _measure(cases: list[tuple[Array, list[Array], Array]], nodes: int) -> dict[str, Any]:
    cluster = Cluster.preset("h100", nodes=nodes, devices_per_node=DEVICES // nodes,
                             slots_per_device=SLOTS // DEVICES)
    sums: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        sums.setdefault(name, []).append(value)

    for slots, steps, home in cases:
        for ids in steps:
            counts = count_tokens(ids, home, DEVICES, EXPERTS)
            best = _flattest(counts.sum(axis=0), slots)
            note("counts_ms", _ms(lambda ids=ids, home=home: count_tokens(
                ids, home, DEVICES, EXPERTS)))
            for policy in ("balanced", "even", "nearest", "fewest_active"):
                spec = DispatchSpec(policy=policy)
                note(f"{policy}_quotas_ms", _ms(
                    lambda counts=counts, slots=slots, spec=spec: split(
                        counts, slots, cluster, spec)
                ))
                quotas = split(counts, slots, cluster, spec)
                note(f"{policy}_lp_ratio", _busiest(quotas) / best)
                note(f"{policy}_remote_node_share", _remote(quotas, cluster))
                if policy == "balanced":
                    layer = layer_dispatch(slots, EXPERTS, cluster, spec)
                    counted = layer.count(ids, home)
                    note("ids_to_slots_ms", _ms(
                        lambda layer=layer, counted=counted, quotas=quotas: layer.place(
                            counted, quotas.copy())
                    ))
    figures = {name: float(np.mean(values)) for name, values in sums.items()}
    figures["counts_and_balanced_ms"] = figures["counts_ms"] + figures["balanced_quotas_ms"]
    figures["balanced_lp_ratio_worst"] = float(max(sums["balanced_lp_ratio"]))
    return figures


def _first_call_s() -> float:
    """CPU seconds of the first split in this process: compilation, or reading its cache."""
    start = time.process_time()
    cluster = Cluster.preset("h100", devices_per_node=2, slots_per_device=1)
    slots = np.zeros((2, 1), np.int16)
    layer = layer_dispatch(slots, 1, cluster, DispatchSpec())
    counted = layer.count(np.zeros((1, 1), np.int32), np.zeros(1, np.int32))
    layer.place(counted, layer.split(counted.counts_GX))
    return time.process_time() - start


def _ms(action: Callable[[], object]) -> float:
    """Median CPU milliseconds of one call, each timing long enough for the clock."""
    action()
    calls = 8
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(calls):
            action()
        taken.append((time.process_time() - start) / calls)
    return float(np.median(taken)) * 1e3


def _busiest(quotas_GS: Array) -> float:
    return float(quotas_GS.sum(axis=0).reshape(DEVICES, -1).sum(axis=1).max())


def _remote(quotas_GS: Array, cluster: Cluster) -> float:
    """Share of assignments computed in another node than their home's."""
    node_S = np.repeat(cluster.node_G, SLOTS // DEVICES)
    return float(quotas_GS[cluster.node_G[:, None] != node_S].sum() / quotas_GS.sum())


def _flattest(total_E: Array, slots_GC: Array) -> float:
    """The fractional optimum: least possible tokens of the busiest device."""
    pairs = np.unique([(e, g) for g, row in enumerate(slots_GC) for e in row if total_E[e]], axis=0)
    used = np.flatnonzero(total_E)
    row_of = np.zeros(EXPERTS, int)
    row_of[used] = np.arange(len(used))
    n = len(pairs)
    placed = sparse.coo_matrix((np.ones(n), (row_of[pairs[:, 0]], np.arange(n))),
                               shape=(len(used), n + 1))
    load = sparse.coo_matrix(
        (np.r_[np.ones(n), -np.ones(DEVICES)],
         (np.r_[pairs[:, 1], np.arange(DEVICES)], np.r_[np.arange(n), np.full(DEVICES, n)])),
    )
    answer = linprog(np.r_[np.zeros(n), 1], A_ub=load, b_ub=np.zeros(DEVICES), A_eq=placed,
                     b_eq=total_E[used], method="highs")
    return float(answer.fun)


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(description="cost and flatness of dispatch")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="+", choices=["one_node", "four_nodes"],
                        default=["one_node", "four_nodes"])
    options = parser.parse_args()
    found = {"dispatch": dispatch(tuple(options.only))}
    print(json.dumps(found) if options.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
