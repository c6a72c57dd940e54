"""Do printed 95 % bands hold? Over splits of two real routing sets, in `coverage()`.

A split holds requests back for planning (30 %, cheap methods); the others are the population. The
judging trace is drawn from the population, request by request, with replacement: so it is a sample
of exactly that traffic, and what a figure's true value is can be asked of the population itself.
The truth is reckoned without the product's sampler: in each of many steps every place in flight
holds an independent token of the population and the ones that follow it, as on a server in service.

A band of a level holds where it contains the true figure, that of a difference where it contains
the true change against contiguous in per cent. A case's spread is what its estimates scatter about
their truths, central 95 % over its splits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import loadmaster as lm
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.traces.steps import Steps

Section = dict[str, Any]

ROUTING = Path(__file__).resolve().parents[2] / "shared" / "data" / "routing"
SPLITS = 32                   # of each case
TRUE_STEPS = 400
POPULATION = 0.7              # of the requests; plans are made from the others
METHODS = ("eplb", "lpt_swap")
REFERENCE = "contiguous"
LEVEL_HOLDS, DIFFERENCE_HOLDS, WIDEST = 0.90, 0.93, 2.0


@dataclass(frozen=True)
class Case:
    """One routing set, some of its layers, judged by so many requests in such steps."""

    file: str
    layers: tuple[int, ...]
    requests: int
    concurrency: int
    tokens: int
    spare_slots: int           # per device, of 8

    @property
    def name(self) -> str:
        return (
            f"{self.file.split('_')[0]}, layers {', '.join(map(str, self.layers))}, "
            f"{self.requests} requests, {self.concurrency} in flight, steps of {self.tokens}, "
            f"{self.spare_slots} spare slots a device"
        )


GPT, ESFT = "gptoss20b_decode.npz", "esft_law_translation.npz"
CASES = (
    Case(GPT, (3, 15), 87, 64, 512, 1),
    Case(GPT, (9,), 87, 16, 512, 0),
    Case(GPT, (0, 8, 16), 87, 256, 512, 1),
    Case(GPT, (12, 13), 87, 4, 256, 2),
    Case(GPT, (6, 22), 40, 64, 256, 2),
    Case(ESFT, (1, 20), 22, 64, 512, 1),
    Case(ESFT, (7, 16), 22, 16, 256, 1),
    Case(ESFT, (2, 12, 25), 22, 64, 256, 2),
    Case(ESFT, (5, 6), 22, 4, 128, 0),
    Case(ESFT, (9, 18), 40, 32, 512, 1),
)


def coverage(splits: int = SPLITS) -> Section:
    """How often bands hold, and how wide they are, case by case and over all."""
    if not ROUTING.is_dir():
        return {"holds": False, "not_run": f"real routing is not present: {ROUTING}"}
    found = {case.name: _of_case(case, splits) for case in CASES}
    def of_all(key: str) -> list[float]:
        every = (row[key] for rows in found.values() for row in rows.values())
        return [value for value in every if value is not None]

    level, difference = (float(np.mean(of_all(f"{what}_held"))) for what in ("level", "difference"))
    widest = max(of_all("level_width") + of_all("difference_width"))
    return {
        "holds": level >= LEVEL_HOLDS and difference >= DIFFERENCE_HOLDS and widest <= WIDEST,
        "splits": splits * len(CASES), "level_held": level, "at_least_level": LEVEL_HOLDS,
        "difference_held": difference, "at_least_difference": DIFFERENCE_HOLDS,
        "widest_in_spreads": widest, "at_most_spreads": WIDEST, "cases": found,
    }


def _of_case(case: Case, splits: int) -> dict[str, dict[str, float | None]]:
    """Plan -> how often its bands held, and their width in spreads of what was found."""
    rows = [row for seed in range(splits) for row in _of_split(case, seed)]
    names = (REFERENCE, *METHODS)
    found = {}
    for name in names:
        mine = np.array([row[1:] for row in rows if row[0] == name])
        held, width = _held(mine[:, :4])
        found[name] = {
            "true_level": float(mine[:, 0].mean()),
            "bias": float((mine[:, 1] - mine[:, 0]).mean()),
            "level_held": held, "level_width": width,
            "difference_held": None, "difference_width": None,
        }
        if name != REFERENCE:
            held, width = _held(mine[:, 4:])
            found[name] |= {"difference_held": held, "difference_width": width}
    print(f"  {case.name}: {found}", file=sys.stderr, flush=True)
    return found


def _held(mine: Any) -> tuple[float, float]:
    """(share of bands that hold, their median width in spreads); columns: true, found, low, high.
    """
    true, found, low, high = mine.T
    spread = float(np.subtract(*np.quantile(found - true, (0.975, 0.025))))
    return float(((low <= true) & (true <= high)).mean()), float(np.median(high - low)) / spread


def _of_split(case: Case, seed: int) -> Iterator[tuple[Any, ...]]:
    """(plan, true level, found, low, high, true change, found, low, high) of every plan."""
    population, planning = _routing(case).split(POPULATION, seed=seed)
    cluster = lm.Cluster.preset(
        "h100", devices_per_node=8,
        slots_per_device=planning.num_experts // 8 + case.spare_slots,
    )
    few = lm.StepSampler(tokens=256, concurrency=16)
    plans = {
        name: lm.plan(planning, cluster, method=name, steps=few).plan
        for name in (REFERENCE, *METHODS)
    }
    true_steps = _steps_in_service(population, case, seed)
    true = {
        name: evaluate(plan, population, cluster, steps=true_steps).peak_mean
        for name, plan in plans.items()
    }
    table = lm.compare(
        plans, _drawn(population, case.requests, seed), cluster,
        steps=lm.StepSampler(tokens=case.tokens, concurrency=case.concurrency), current=REFERENCE,
    )
    for name in plans:
        row = table.row(name)
        yield (
            name, true[name], row.metric, row.metric_low, row.metric_high,
            (true[name] / true[REFERENCE] - 1) * 100, row.change_percent, row.change_low_percent,
            row.change_high_percent,
        )


_LOADED: dict[str, dict[str, Any]] = {}


def _routing(case: Case) -> lm.RoutingTrace:
    if case.file not in _LOADED:
        with np.load(ROUTING / case.file) as file:
            _LOADED[case.file] = {name: file[name] for name in ("ids", "seq", "n_experts")}
    data = _LOADED[case.file]
    return lm.RoutingTrace.from_arrays(
        np.ascontiguousarray(data["ids"][:, case.layers]), num_experts=int(data["n_experts"]),
        request=data["seq"],
    )


def _drawn(population: lm.RoutingTrace, requests: int, seed: int) -> lm.RoutingTrace:
    """So many of the population's requests, each drawn from all of them."""
    token, start = _by_request(population)
    drawn = np.random.default_rng([seed, 1]).integers(0, len(start) - 1, requests)
    parts = [token[start[r] : start[r + 1]] for r in drawn]
    return lm.RoutingTrace.from_arrays(
        population.ids[np.concatenate(parts)], num_experts=population.num_experts,
        request=np.repeat(np.arange(requests), list(map(len, parts))),
    )


def _steps_in_service(population: lm.RoutingTrace, case: Case, seed: int) -> Steps:
    """Steps of a server with endless requests of this kind; places in flight are independent."""
    token, start = _by_request(population)
    rng = np.random.default_rng([seed, 2])
    shape = (TRUE_STEPS, case.concurrency)
    at = rng.integers(0, len(token), shape)
    end = start[np.searchsorted(start, at, side="right")]
    turns = []
    for _ in range(-(-case.tokens // case.concurrency)):
        new = rng.integers(0, len(start) - 1, shape)        # who replaces a request that has ended
        at, end = np.where(at < end, at, start[new]), np.where(at < end, end, start[new + 1])
        turns.append(token[at])
        at = at + 1
    step = np.stack(turns, axis=1).reshape(TRUE_STEPS, -1)[:, : case.tokens]
    return Steps(step.reshape(-1), np.arange(TRUE_STEPS + 1) * case.tokens)


def _by_request(trace: lm.RoutingTrace) -> tuple[Any, Any]:
    """(tokens request by request, where each request starts, and the end)."""
    _, place = np.unique(trace.request_T(), return_inverse=True)
    return np.argsort(place, kind="stable"), np.concatenate(([0], np.cumsum(np.bincount(place))))
