"""What each part of the search is worth.

`python benchmarks/placement_ablation.py [--json] [--save FILE] [--only KEY ...]`. Every section
plans real layers with the search as it stands ("all") and with one part switched off, and judges
each plan on requests that it has not seen. A part is switched off from here, by putting another
value in the place of a name of the search: the package carries no switches. Of each variant: mean
and 99th percentile of the objective over unseen steps (imbalance, microseconds, or token transfers
where the section is about them), CPU seconds of planning without compilation, and `loses`: what the
mean loses by switching the part off, in per cent of "all", beside `noise`, the standard error of
that difference over layers, seeds and traces. `holds`: the objective that the section is about
loses more than its noise when it is replaced, and no part does harm: "all" is not worse than any
variant by more than twice the noise.

The door for new strategies: a part that does not show here does not enter, and one that no longer
shows goes. Real traces are read from ../shared/data beside the checkout; a section that needs them
says so when they are absent. Planned on one core, seeds paired; progress on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from placement_quality import DATA, routing

from loadmaster.placement import planning_traffic
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.methods import baselines
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning import planner
from loadmaster.placement.planning.planner import plan
from loadmaster.placement.rebalancing.rebalance import rebalance
from loadmaster.placement.search import layer_search, time_search
from loadmaster.placement.search.annealing.exact_balance import improve_exact_balance
from loadmaster.placement.search.annealing.fixed_shares import improve_fixed_shares
from loadmaster.placement.search.balance_score import even_device_load
from loadmaster.placement.search.scenarios import Prior, home_rows, search_rows
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace

Array = npt.NDArray[np.float64]
Section = dict[str, Any]
SEEDS = (0, 1)
ALL = "all"
GPTOSS, ESFT = "gptoss20b_decode", "esft_law_translation"


class OneCore:
    """The executor that runs layers one after another."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
        return map(function, items)


ONE_CORE = OneCore()


@dataclass(frozen=True)
class Figures:
    """What a plan is worth: one mean and one 99th percentile for each case (a layer of a trace)."""

    mean: list[float]
    p99: list[float]


@dataclass(frozen=True)
class Case:
    """One planning call and its judge; called once to warm up, on little, then for good."""

    plan: Callable[[bool], Plan]            # argument: only to compile
    judge: Callable[[Plan], Figures]


@dataclass(frozen=True)
class Variant:
    """The search with some names replaced: (module, name) -> value."""

    parts: dict[tuple[Any, str], Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)     # of the planning call

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for (module, name), value in self.parts.items():
                stack.enter_context(mock.patch.object(module, name, value))
            yield


def compared(
    cases: Callable[[Variant], list[Case]], variants: dict[str, Variant], replaced: Iterable[str]
) -> Section:
    """Figures of every variant beside "all". replaced: variants without the section's objective."""
    found: dict[str, tuple[list[float], list[float], float]] = {}
    for name, variant in {ALL: Variant(), **variants}.items():
        mean, p99, cpu_s = [], [], 0.0
        with variant.applied():
            for i, case in enumerate(cases(variant)):
                if i == 0:
                    case.plan(True)
                start = time.process_time()
                made = case.plan(False)
                cpu_s += time.process_time() - start
                figures = case.judge(made)
                mean += figures.mean
                p99 += figures.p99
        found[name] = mean, p99, cpu_s
        print(f"  {name}: {np.mean(mean):.5f} {np.mean(p99):.5f} {cpu_s:.1f} s", file=sys.stderr)
    base = np.array(found[ALL][0])
    section: Section = {"holds": True, "cases": len(base)}
    for name, (mean, p99, cpu_s) in found.items():
        section[name] = row = {
            "mean": float(np.mean(mean)), "p99": float(np.mean(p99)), "cpu_s": round(cpu_s, 2),
        }
        if name == ALL:
            continue
        change = np.array(mean) / base - 1.0
        loses, noise = float(change.mean()), float(change.std(ddof=1) / np.sqrt(len(change)))
        row |= {"loses_percent": 100 * loses, "noise_percent": 100 * noise}
        harmful = loses < -2 * noise
        section["holds"] &= not harmful and (name not in replaced or loses > noise)
    return section


# ---- real layers --------------------------------------------------------------------------------


def layers_of(name: str, layers: tuple[int, ...]) -> RoutingTrace:
    """Some layers of a recorded trace."""
    trace = routing(name)
    return replace(
        trace, ids=np.ascontiguousarray(trace.ids[:, list(layers)]), gates=None,
        layer_indices=tuple(trace.layer_indices[i] for i in layers),
    )


def devices(trace: RoutingTrace, count: int, spare: float = 1.25, **options: Any) -> Cluster:
    nodes = options.pop("nodes", 1)
    return Cluster.preset(
        "h100", nodes=nodes, devices_per_node=count // nodes,
        slots_per_device=int(np.ceil(trace.num_experts * spare / count)), **options,
    )


def balance_of(
    made: Plan, unseen: RoutingTrace, cluster: Cluster, dispatch: str, steps: StepSampler
) -> Figures:
    imbalance_WL = evaluate(made, unseen, cluster, steps=steps, dispatch=dispatch).imbalance_WL
    return Figures(
        np.nanmean(imbalance_WL, axis=0).tolist(),
        np.nanquantile(imbalance_WL, 0.99, axis=0).tolist(),
    )


STEPS = StepSampler()
FEW_IN_FLIGHT = StepSampler(concurrency=4)


def unseen_cases(
    variant: Variant, traces: list[RoutingTrace], count: int, dispatch: str = "balanced",
    judged_on: StepSampler = STEPS, seeds: tuple[int, ...] = SEEDS, **options: Any,
) -> list[Case]:
    """Half of the requests to plan on, the other half judges."""
    cluster_options = {k: options.pop(k) for k in ("nodes", "traffic", "spare") if k in options}
    cases = []
    for trace in traces:
        cluster = devices(trace, count, **cluster_options)
        for seed in seeds:
            known, unseen = trace.split(0.5, seed=seed)
            cases.append(Case(
                partial(_planned, known, cluster, dispatch=dispatch, seed=seed,
                        **(options | variant.options)),
                partial(balance_of, unseen=unseen, cluster=cluster, dispatch=dispatch,
                        steps=judged_on),
            ))
    return cases


def _planned(known: RoutingTrace, cluster: Cluster, warm_up: bool, **options: Any) -> Plan:
    if warm_up:
        known = known.select(np.arange(min(known.num_tokens, 4_000)))
        options |= {"effort": "fast", "time_limit_s": None}
    return plan(known, cluster, executor=ONE_CORE, **options).plan


def both() -> list[RoutingTrace]:
    return [layers_of(GPTOSS, (3, 14)), layers_of(ESFT, (5, 18))]


def one_each() -> list[RoutingTrace]:
    return [layers_of(GPTOSS, (3,)), layers_of(GPTOSS, (14,)), layers_of(ESFT, (5,))]


def without_search() -> Variant:
    return Variant(options={"method": "lpt_swap"})


# ---- objectives ---------------------------------------------------------------------------------


def exact_balance() -> Section:
    """8 devices, `balanced`: the exact split of every step against the water-filled one."""
    return compared(
        lambda v: unseen_cases(v, both(), 8),
        {
            "no search": without_search(),
            "water-filled": Variant({(layer_search, "MOST_DEVICES"): 0}),
            "fixed shares": Variant({
                (layer_search, "improve_exact_balance"): improve_fixed_shares,
            }),
        },
        ["no search", "water-filled", "fixed shares"],
    )


def water_filled() -> Section:
    """16 devices, `balanced`."""
    return compared(
        lambda v: unseen_cases(v, both(), 16),
        {
            "no search": without_search(),
            "fixed shares": Variant({(layer_search, "improve_water_filled"): improve_fixed_shares}),
        },
        ["no search", "fixed shares"],
    )


def fixed_shares(dispatch: str) -> Section:
    """8 devices under a rule that is blind to load."""
    exact = Variant({(layer_search, "improve_fixed_shares"): _any_rule(improve_exact_balance)})
    variants = {"no search": without_search(), "exact balance": exact}
    if dispatch in layer_search.NEAREST_RULES:
        variants |= {
            "even shares": Variant({
                (layer_search, "improve_fixed_shares"): _any_rule(improve_fixed_shares),
            }),
            "no candidates with empty slots": Variant({
                (layer_search, "_with_fewer_replicas"): _nothing,
            }),
        }
    return compared(
        lambda v: unseen_cases(v, one_each(), 8, dispatch, seeds=(0,), nodes=2, effort="fast"),
        variants, ["no search"],
    )


def _any_rule(improve: Callable[..., Any]) -> Callable[..., Any]:
    def without_rule(*arguments: Any, **_rule: Any) -> Any:
        return improve(*arguments)

    return without_rule


def _nothing(*_: Any) -> Iterator[Any]:
    return iter(())


def even_average() -> Section:
    """Loads alone, `even`, 8 and 32 devices: peak of the other half's average loads."""
    def cases(variant: Variant) -> list[Case]:
        found = []
        for trace in [layers_of(GPTOSS, tuple(range(0, 24, 3))), layers_of(ESFT, (2, 8, 14, 20))]:
            for count in (8, 16):
                cluster = devices(trace, count)
                known, unseen = trace.split(0.5, seed=0)
                found.append(Case(
                    partial(_on_loads, known.load_LE(), cluster, variant.options),
                    partial(_even_peak, load_LE=known.load_LE().astype(np.float64)),
                ))
                found.append(Case(
                    partial(_on_loads, known.load_LE(), cluster, variant.options),
                    partial(_even_peak, load_LE=unseen.load_LE().astype(np.float64)),
                ))
        return found

    return compared(
        cases,
        {
            "no search": without_search(),
            "search from greedy": Variant({(layer_search, "lpt_swap"): baselines.greedy}),
        },
        ["no search"],
    )


def _on_loads(load_LE: Any, cluster: Cluster, options: Section, warm_up: bool) -> Plan:
    loads = Profile.from_loads(load_LE[:1] if warm_up else load_LE)
    return plan(loads, cluster, dispatch="even", executor=ONE_CORE, **options).plan


def _even_peak(made: Plan, load_LE: Array) -> Figures:
    load_LG = np.stack([
        even_device_load(load_E, slots) for load_E, slots in zip(load_LE, made.slots, strict=True)
    ])
    peak_L = load_LG.max(axis=1) / load_LG.mean(axis=1)
    return Figures(peak_L.tolist(), peak_L.tolist())


def budget_average() -> Section:
    """Loads alone, a tenth of the slots may move: from one half of the requests to the other."""
    def cases(variant: Variant) -> list[Case]:
        found = []
        for trace in [layers_of(GPTOSS, tuple(range(0, 24, 3))), layers_of(ESFT, (2, 8, 14, 20))]:
            for seed in SEEDS:
                cluster = devices(trace, 16)
                before, after = _halves(trace, seed)
                current_plan = plan(
                    Profile.from_loads(before.load_LE()), cluster, dispatch="even",
                    executor=ONE_CORE,
                ).plan
                found.append(Case(
                    partial(_rebalanced, current_plan, after.load_LE(), cluster),
                    partial(_even_peak, load_LE=after.load_LE().astype(np.float64)),
                ))
        return found

    return compared(
        cases,
        {
            "no search": Variant({(layer_search, "improve_average"): lambda *a: a[1]}),
        },
        ["no search"],
    )


def _halves(trace: RoutingTrace, seed: int) -> tuple[RoutingTrace, RoutingTrace]:
    """By domain where a trace has two, so that there is something to move for."""
    if trace.domain is not None and len(found := np.unique(trace.domain)) == 2:
        first, second = (trace.select(trace.domain == d) for d in found)
        return (first, second) if seed == 0 else (second, first)
    return trace.split(0.5, seed=seed)


def _rebalanced(current_plan: Plan, load_LE: Any, cluster: Cluster, _warm_up: bool) -> Plan:
    return rebalance(
        current_plan, Profile.from_loads(load_LE), cluster, dispatch="even", executor=ONE_CORE,
        max_moves=current_plan.num_layers * cluster.total_slots // 10,
    ).plan


def step_time(tokens: int) -> Section:
    """Time of steps of so many tokens, gpt-oss sizes and ESFT's (DeepSeek-V2-Lite)."""
    sizes = {GPTOSS: (2880, 2880), ESFT: (2048, 1408)}

    def cases(variant: Variant) -> list[Case]:
        found = []
        for name, (hidden, intermediate) in sizes.items():
            trace = layers_of(name, (3, 14))
            cluster = devices(trace, 8)
            model = ModelSpec(
                name=name, num_layers=2, num_experts=trace.num_experts, top_k=trace.top_k,
                hidden=hidden, intermediate=intermediate,
            )
            steps = StepSampler(tokens=tokens, concurrency=min(tokens, 64))
            known, unseen = trace.split(0.5, seed=0)
            found.append(Case(
                partial(_planned, known, cluster, model=model, objective="time", steps=steps,
                        **variant.options),
                partial(_time_of, unseen=unseen, cluster=cluster, steps=steps, model=model),
            ))
        return found

    starts = time_search.time_candidates
    return compared(
        cases,
        {
            "no search": without_search(),
            "search for balance alone": Variant({(layer_search, "time_candidates"): _nothing}),
            "packings alone": Variant({(layer_search, "time_candidates"): partial(
                _but, starts, "search for time")}),
            "search from packings alone": Variant({(layer_search, "time_candidates"): partial(
                _but, starts, "search for time, balance")}),
            "search from balance alone": Variant({(layer_search, "time_candidates"): partial(
                _but, starts, "search for time, packed")}),
            "packed full": Variant({(time_search, "SPARE_SHARES"): (1.0,)}),
        },
        ["no search", "search for balance alone"],
    )


def _but(
    candidates: Callable[..., Iterator[tuple[str, Any]]], unwanted: str, *arguments: Any
) -> Iterator[tuple[str, Any]]:
    """The candidates but those of a name; of searches, what they take is saved too."""
    real = time_search.search_time
    turn = iter(("search for time, packed", "search for time, balance"))

    def search_or_not(task: Any, space: Any, start_GC: Any, moves: float) -> Any:
        return start_GC if next(turn).startswith(unwanted) else real(task, space, start_GC, moves)

    with mock.patch.object(time_search, "search_time", search_or_not):
        yield from (c for c in candidates(*arguments) if not c[0].startswith(unwanted))


def _time_of(
    made: Plan, unseen: RoutingTrace, cluster: Cluster, steps: StepSampler, model: ModelSpec
) -> Figures:
    found = evaluate(made, unseen, cluster, steps=steps, dispatch="balanced", model=model)
    assert found.layer_time_us is not None and found.step_time_us_W is not None
    return Figures(
        found.layer_time_us.tolist(), [float(np.quantile(found.step_time_us_W, 0.99))]
    )


# ---- what the search prepares for ---------------------------------------------------------------


def _prior(**changes: float) -> Variant:
    """Scenarios of another prior."""
    prior = Prior(**changes)        # type: ignore[arg-type]
    return Variant({
        (layer_search, "home_rows"): partial(home_rows, prior=prior),
        (layer_search, "search_rows"): partial(search_rows, prior=prior),
    })


def _same_every_round() -> Variant:
    def rows(home: Array, kinds: Any, count: int, speed: float, _rng: Any) -> Any:
        return search_rows(home, kinds, count, speed, np.random.default_rng(0))

    return Variant({(layer_search, "search_rows"): rows})


SCENARIOS: dict[str, Callable[[], Variant]] = {
    "no request kinds": lambda: _prior(requests=0.0, home=0.95),
    "no unknown domains": lambda: _prior(unknown=0.0, home=0.85),
    "neither": lambda: _prior(requests=0.0, unknown=0.0, home=1.0),
    "steps not hardened": lambda: _prior(hardening=1.0),
    "same scenarios in every round": _same_every_round,
    "no steps of few requests": lambda: Variant({
        (planning_traffic, "_other_steps"): lambda *_: (),
    }),
    "no second order in overload": lambda: Variant({(layer_search, "BEND"): 0.0}),
    "no other method's candidates": lambda: Variant({
        (layer_search, "known_candidates"): _nothing,
    }),
    "rounds as where transfers cost": lambda: Variant({
        (layer_search, "ROUNDS_BALANCE"): layer_search.ROUNDS,
        (layer_search, "FEWEST_BALANCE"): layer_search.FEWEST_FEW,
    }),
    "search from greedy": lambda: Variant({(layer_search, "lpt_swap"): baselines.greedy}),
}


def same_mix() -> Section:
    """8 devices, the same mix of requests, four of them in flight."""
    return compared(
        lambda v: unseen_cases(v, both(), 8, judged_on=FEW_IN_FLIGHT, effort="fast"),
        {name: make() for name, make in SCENARIOS.items()}, [],
    )


def shifted_mix() -> Section:
    """8 devices, planned on one domain and judged on the other."""
    def cases(variant: Variant) -> list[Case]:
        trace, found = layers_of(ESFT, (2, 8, 14, 20)), []
        cluster = devices(trace, 8)
        for seed in SEEDS:
            known, other = _halves(trace, seed)
            found.append(Case(
                partial(_planned, known, cluster, seed=seed, effort="fast", **variant.options),
                partial(balance_of, unseen=other, cluster=cluster, dispatch="balanced",
                        steps=STEPS),
            ))
        return found

    return compared(cases, {name: make() for name, make in SCENARIOS.items()}, [])


def transfers() -> Section:
    """Two nodes of four devices, one transfer per node: what crosses, per token."""
    def cases(variant: Variant) -> list[Case]:
        found = []
        for trace in one_each():
            cluster = devices(trace, 8, nodes=2, traffic="return_home/per_node")
            known, unseen = trace.split(0.5, seed=0)
            found += [
                Case(
                    partial(_planned, known, cluster, effort="fast", **variant.options),
                    partial(_crossing, unseen=unseen, cluster=cluster),
                ),
            ]
        return found

    return compared(
        cases,
        {
            "no search": without_search(),
            "no search for transfers": Variant({(layer_search, "TRANSFER_WEIGHTS_FEW"): ()}),
            "one weight": Variant({(layer_search, "TRANSFER_WEIGHTS_FEW"): (1.0,)}),
            "other weight": Variant({(layer_search, "TRANSFER_WEIGHTS_FEW"): (2.0,)}),
            "two weights": Variant({(layer_search, "TRANSFER_WEIGHTS_FEW"): (1.0, 4.0)}),
        },
        ["no search", "no search for transfers"],
    )


def _crossing(made: Plan, unseen: RoutingTrace, cluster: Cluster) -> Figures:
    found = evaluate(made, unseen, cluster, steps=STEPS, dispatch="balanced")
    return Figures([found.remote_node_copies_per_token], [found.imbalance_p99])


def milp_refine() -> Section:
    """Effort thorough, layers small enough for the program: 4 devices, a part of the experts."""
    def cases(variant: Variant) -> list[Case]:
        found = []
        for name, layers in ((GPTOSS, (3, 14)), (ESFT, (5, 18))):
            trace = layers_of(name, layers)
            cluster = devices(trace, 4, spare=1.0 + 4 / trace.num_experts)
            known, unseen = trace.split(0.5, seed=0)
            found.append(Case(
                partial(_planned, known, cluster, **({"effort": "thorough"} | variant.options)),
                partial(balance_of, unseen=unseen, cluster=cluster, dispatch="balanced",
                        steps=STEPS),
            ))
        return found

    return compared(cases, {"no program": Variant(_without_program())}, [])


def _without_program() -> dict[tuple[Any, str], Any]:
    return {(planner, "search_and_polish"): layer_search.search_layer}


SECTIONS: dict[str, Callable[[], Section]] = {
    "objective.exact_balance": exact_balance,
    "objective.water_filled": water_filled,
    "objective.fixed_shares.even": partial(fixed_shares, "even"),
    "objective.fixed_shares.nearest": partial(fixed_shares, "nearest"),
    "objective.fixed_shares.sglang_static": partial(fixed_shares, "sglang_static"),
    "objective.even_average": even_average,
    "objective.step_time.64": partial(step_time, 64),
    "objective.step_time.512": partial(step_time, 512),
    "strategy.budget_average": budget_average,
    "strategy.same_mix": same_mix,
    "strategy.shifted_mix": shifted_mix,
    "strategy.transfers": transfers,
    "strategy.milp_refine": milp_refine,
}


def main() -> None:
    """Run the chosen sections, print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="*", default=[], help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--save", type=Path, help="the same into a file, section by section")
    options = parser.parse_args()
    asked = [name for part in options.only for name in part.split(",") if name]
    unknown = [a for a in asked if not any(f"{n}.".startswith(f"{a}.") for n in SECTIONS)]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are: {', '.join(SECTIONS)}")
    report: Section = {}
    for name, section in SECTIONS.items():
        if asked and not any(f"{name}.".startswith(f"{a}.") for a in asked):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        if (DATA / f"{GPTOSS}.npz").exists() and (DATA / f"{ESFT}.npz").exists():
            found = section()
        else:
            found = {"holds": False, "skipped": "real data not present: ../shared/data"}
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        report[name] = found
        if options.save:
            options.save.write_text(json.dumps(report, indent=1))
        if not options.json:
            _show(name, found)
    if options.json:
        print(json.dumps(report, indent=1))


def _show(name: str, found: Section) -> None:
    print(f"\n{name}: {'holds' if found['holds'] else 'DOES NOT HOLD'}")
    if "skipped" in found:
        print(f"  skipped: {found['skipped']}")
        return
    for variant, row in found.items():
        if isinstance(row, dict):
            lost = ""
            if "loses_percent" in row:
                lost = f"{row['loses_percent']:8.3f} ± {row['noise_percent']:.3f} %"
            figures = f"{row['mean']:9.5f} {row['p99']:9.5f} {row['cpu_s']:7.1f} s"
            print(f"  {variant:40} {figures} {lost}")


if __name__ == "__main__":
    main()
