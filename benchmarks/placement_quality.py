"""Plans on real routing, judged on requests they have not seen: same mix, a shift, online, nodes.

gpt-oss (24 layers of 32 experts, top-4, decode) and ESFT (26 of 64, top-6, prefill), 8 devices,
25 % and 50 % spare slots, default steps (512 tokens, 64 requests in flight), objective balance.
Means over three seeds. One set of constants for all of it; `eplb` and other orders are printed
beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.evaluate import Evaluation, evaluate
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import plan
from loadmaster.placement.rebalancing.rebalance import rebalance
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "routing"
SEEDS = (0, 1, 2)
SPARE = {"25": 1.25, "50": 1.5}
ONLINE_STEPS = 4         # of 512 tokens
Section = dict[str, Any]


def routing(name: str) -> RoutingTrace:
    """One of the recorded traces."""
    file = np.load(DATA / f"{name}.npz")
    return RoutingTrace.from_arrays(
        file["ids"], num_experts=int(file["n_experts"]), request=file["seq"],
        domain=file["dom"], domain_names=[str(d) for d in file["domains"]],
    )


def with_data(name: str, section: Callable[[RoutingTrace], Section]) -> Callable[[], Section]:
    """The section on this trace, or the word that the trace is not there."""
    def run() -> Section:
        if not (DATA / f"{name}.npz").exists():
            return {"holds": False, "skipped": "real data not present: ../shared/data"}
        return section(routing(name))

    return run


def eight(trace: RoutingTrace, spare: str, nodes: int = 1, traffic: str = "per_expert") -> Cluster:
    """Eight devices with so many per cent of spare slots."""
    slots = round(trace.num_experts * SPARE[spare] / 8)
    return Cluster.preset(
        "h100", nodes=nodes, devices_per_node=8 // nodes, slots_per_device=slots,
        traffic=f"return_home/{traffic}",
    )


def unseen(
    made: Plan, trace: RoutingTrace, cluster: Cluster, dispatch: str = "balanced", **steps: Any
) -> Evaluation:
    """How a plan fares on a trace's steps."""
    return evaluate(made, trace, cluster, steps=StepSampler(**steps), dispatch=dispatch)


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Column means."""
    return {name: mean(row[name] for row in rows) for name in rows[0]}


# ---- the same mix -----------------------------------------------------------------------------


def iid(trace: RoutingTrace) -> Section:
    """Half of the requests to plan on, drawn at random; the other half judges."""
    wanted = {"25": (1.012, 1.05), "50": (1.005, 1.01)}
    found: Section = {"holds": True}
    for spare, (most, most_few) in wanted.items():
        cluster, rows = eight(trace, spare), []
        for seed in SEEDS:
            known, other = trace.split(0.5, seed=seed)
            made = plan(known, cluster, seed=seed).plan
            rival = plan(known, cluster, method="eplb").plan
            rows.append({
                "unseen": unseen(made, other, cluster).imbalance_mean,
                "four_in_flight": unseen(made, other, cluster, concurrency=4).imbalance_mean,
                "shuffled": unseen(made, other, cluster, order="shuffled").imbalance_mean,
                "stored": unseen(made, other, cluster, order="stored").imbalance_mean,
                "eplb_even": unseen(rival, other, cluster, "even").imbalance_mean,
                "eplb_balanced": unseen(rival, other, cluster).imbalance_mean,
            })
        found[f"spare_{spare}"] = row = averaged(rows)
        row |= {"unseen_wanted": most, "four_in_flight_wanted": most_few}
        found["holds"] &= row["unseen"] <= most and row["four_in_flight"] <= most_few
    return found


# ---- another mix ------------------------------------------------------------------------------


def shifted(known: RoutingTrace, other: RoutingTrace, spare: str) -> dict[str, float]:
    """Planned on one kind of traffic, judged on another; and at home, on requests held back."""
    cluster, rows = eight(known, spare), []
    for seed in SEEDS:
        made = plan(known, cluster, seed=seed)
        rival = plan(known, cluster, method="eplb").plan
        assert made.evidence.validation is not None
        rows.append({
            "unseen": unseen(made.plan, other, cluster).imbalance_mean,
            "at_home": made.evidence.validation,
            "shuffled": unseen(made.plan, other, cluster, order="shuffled").imbalance_mean,
            "eplb_even": unseen(rival, other, cluster, "even").imbalance_mean,
            "eplb_balanced": unseen(rival, other, cluster).imbalance_mean,
        })
    return averaged(rows)


def gptoss_shift(trace: RoutingTrace) -> Section:
    """All but GPQA, judged on GPQA; and the other way."""
    gpqa = np.array(["gpqa" in name for name in trace.domain_names])
    assert trace.domain is not None
    inside: npt.NDArray[np.bool_] = gpqa[trace.domain]
    wanted = {"25": (1.10, 1.20), "50": (1.07, 1.09)}
    found: Section = {"holds": True}
    for spare, (most_there, most_back) in wanted.items():
        there = shifted(trace.select(~inside), trace.select(inside), spare)
        back = shifted(trace.select(inside), trace.select(~inside), spare)
        found[f"spare_{spare}"] = {
            "to_gpqa": there | {"wanted": most_there}, "from_gpqa": back | {"wanted": most_back},
        }
        found["holds"] &= there["unseen"] <= most_there and back["unseen"] <= most_back
    return found


def domains(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """(law, translation)."""
    assert trace.domain is not None
    first, second = np.unique(trace.domain)
    return trace.select(trace.domain == first), trace.select(trace.domain == second)


def esft_shift(trace: RoutingTrace) -> Section:
    """Law, judged on translation, and back; the mean of both counts.

    home_over_perfect: imbalance on held-back requests of the same domain, above 1. Robustness can
    cost no more than that at home.
    """
    law, translation = domains(trace)
    found: Section = {"holds": True}
    for spare, most in {"25": 1.22, "50": 1.06}.items():
        there, back = shifted(law, translation, spare), shifted(translation, law, spare)
        unseen_mean = (there["unseen"] + back["unseen"]) / 2
        home = (there["at_home"] + back["at_home"]) / 2 - 1
        found[f"spare_{spare}"] = {
            "mean": unseen_mean, "wanted": most, "home_over_perfect": home, "home_wanted": 0.01,
            "from_law": there, "to_law": back,
        }
        found["holds"] &= unseen_mean <= most and home <= 0.01
    return found


def online(trace: RoutingTrace) -> Section:
    """Four steps (2,048 tokens) into the other domain a tenth of the slots may move; what the same
    requests send afterwards judges, 8 of them in flight: the shortest end too soon for all."""
    law, translation = domains(trace)
    found: Section = {"holds": True}
    for spare in SPARE:
        cluster, rows = eight(trace, spare), []
        slots = trace.num_layers * cluster.total_slots
        for known, other in ((law, translation), (translation, law)):
            for seed in SEEDS:
                current_plan = plan(known, cluster, seed=seed).plan
                first = StepSampler(seed=seed).sample(other, ONLINE_STEPS).token
                seen = other.select(np.sort(first))
                rest = other.select(np.setdiff1d(np.arange(other.num_tokens), first))
                moved = rebalance(current_plan, seen, cluster, max_moves=slots // 10, seed=seed)
                rows.append({
                    "unseen": unseen(moved.plan, rest, cluster, concurrency=8).imbalance_mean,
                    "before": unseen(current_plan, rest, cluster, concurrency=8).imbalance_mean,
                    "slots_moved": len(moved.moves) / slots,
                })
        found[f"spare_{spare}"] = row = averaged(rows) | {"wanted": 1.01}
        found["holds"] &= row["unseen"] <= 1.01 and row["slots_moved"] <= 0.1
    return found


# ---- nodes ------------------------------------------------------------------------------------


def locality(trace: RoutingTrace) -> Section:
    """Two nodes of four devices, one copy per node: what crosses, against EPLB and even split."""
    wanted = {"25": 0.30, "50": 0.58}
    found: Section = {"holds": True}
    for spare, least in wanted.items():
        cluster, rows = eight(trace, spare, nodes=2, traffic="per_node"), []
        for seed in SEEDS:
            known, other = trace.split(0.5, seed=seed)
            made = plan(known, cluster, seed=seed).plan
            rival = plan(known, cluster, method="eplb").plan
            ours = unseen(made, other, cluster)
            theirs = unseen(rival, other, cluster, "even")
            rows.append({
                "copies": ours.remote_node_copies_per_token,
                "eplb_even_copies": theirs.remote_node_copies_per_token,
                "imbalance": ours.imbalance_mean, "eplb_even_imbalance": theirs.imbalance_mean,
            })
        found[f"spare_{spare}"] = row = averaged(rows)
        row["fewer"] = 1 - row["copies"] / row["eplb_even_copies"]
        row |= {"fewer_wanted": least, "imbalance_wanted": 1.03}
        found["holds"] &= row["fewer"] >= least and row["imbalance"] <= 1.03
    return found


SECTIONS: dict[str, Callable[[], Section]] = {
    "gptoss.iid": with_data("gptoss20b_decode", iid),
    "gptoss.shift": with_data("gptoss20b_decode", gptoss_shift),
    "gptoss.locality": with_data("gptoss20b_decode", locality),
    "esft.shift": with_data("esft_law_translation", esft_shift),
    "online": with_data("esft_law_translation", online),
}
