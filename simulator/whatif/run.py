"""What-if: run every cell of a grid, rank them, find the Pareto front.

A cell makes a plan on one half of the trace's requests, serves the workload with routing of the
other half, and reports time, devices and memory. Cells are independent jobs for any executor with
an ordered `map`; a cell that fails keeps its reason and the others go on. Results are kept in a
file as they come, so an interrupted study resumes. Knows nothing of Ray.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError, LoadmasterError, UsageError
from ...foundation.parallel import Executor
from ...placement.cluster import Cluster
from ...placement.cost.overlap import Overlap
from ...placement.held_back import EVEN_SHARE
from ...placement.memory import plan_bytes_G
from ...placement.planning.planner import plan as make_plan
from ...traces.model_spec import ModelSpec
from ...traces.trace import RoutingTrace
from ..pricing.memory import MemorySpec
from ..serving.batching import BatchLimits
from ..serving.result import SimulationResult, Slo
from ..serving.simulate import Serving, simulate
from ..serving.step_time_bank import BankSpec
from ..serving.workload import Workload
from .grid import Grid, Scenario, cell_text
from .resume import Cell, append_cell, finished_cells

BANK = BankSpec(samples=4)
FIGURES = (
    "latency_mean_us", "latency_p99_us", "ttft_p50_us", "ttft_p99_us", "tpot_p50_us",
    "step_mean_us", "output_tokens_per_s", "goodput_requests_per_s", "imbalance_mean", "devices",
    "expert_bytes_per_device",
)
# A cell that another beats in all of these is no choice.
PARETO_FIGURES = ("latency_mean_us", "devices", "expert_bytes_per_device")
Progress = Callable[[int, int], None]
NOT_BEGUN = "not begun: the time limit; run again with --resume to go on"

# What finished cells depend on besides their inputs: another text when steps are priced another
# way.
PRICES = "fair sharing between nodes"


@dataclass(frozen=True, eq=False)
class Study:
    """What all cells share; picklable."""

    grid: Grid
    trace: RoutingTrace
    model: ModelSpec
    workload: Workload
    memory: MemorySpec | None = None

    def digest(self) -> str:
        """Fingerprint of everything a cell's result depends on, its own fields apart."""
        state = hashlib.sha256(f"{PRICES} {self.trace.digest()}".encode())
        for array in (self.workload.arrival_ns, self.workload.prompt_tokens,
                      self.workload.output_tokens, self.workload.domain):
            state.update(b"-" if array is None else array.tobytes())
        shared = (self.model.digest(), self.memory, self.grid.failures, self.grid.slo,
                  self.grid.seed)
        state.update(repr(shared).encode())
        return state.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class WhatIf:
    """All cells in the grid's order."""

    cells: tuple[Cell, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of all cells, each once, and for how many cells it holds."""
        counted = Counter(note for c in self.cells for note in c.notes)
        whole = sum(c.error is None for c in self.cells)
        return tuple(
            note if n == whole else f"{note} ({n} of {whole} scenarios)"
            for note, n in counted.items()
        )

    @property
    def failed(self) -> tuple[Cell, ...]:
        """Cells without figures."""
        return tuple(c for c in self.cells if c.error is not None)

    def ranked(self, figure: str = "latency_mean_us") -> list[Cell]:
        """Cells with figures, best first: highest goodput or throughput, lowest anything else.

        Ties keep the grid's order. Raises InputError on an unknown figure.
        """
        require_figure(figure)
        done = [c for c in self.cells if c.error is None]
        sign = -1.0 if figure.endswith("_per_s") else 1.0

        def key(cell: Cell) -> float:
            value = cell.figures[figure]
            return float("inf") if value is None else sign * value

        return sorted(done, key=key)

    def pareto(self) -> list[Cell]:
        """Cells that no other beats or equals in every figure while beating it in one."""
        done = self.ranked(PARETO_FIGURES[0])
        points = [tuple(float(c.figures[f] or 0.0) for f in PARETO_FIGURES) for c in done]
        return [
            cell for cell, point in zip(done, points, strict=True)
            if not any(
                all(a <= b for a, b in zip(other, point, strict=True)) and other != point
                for other in points
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Ranked cells, the front and the failures."""
        front = {id(c) for c in self.pareto()}
        return {
            "cells": [
                {"rank": rank, "fields": c.fields, "figures": c.figures, "pareto": id(c) in front,
                 "notes": list(c.notes)}
                for rank, c in enumerate(self.ranked(), start=1)
            ],
            "failed": [{"fields": c.fields, "error": c.error} for c in self.failed],
        }

    def to_csv(self) -> str:
        """One row per cell in the grid's order."""
        fields = sorted({name for c in self.cells for name in c.fields})
        figures = list(dict.fromkeys(name for c in self.cells for name in c.figures))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*fields, *figures, "error"])
        for c in self.cells:
            writer.writerow([*(c.fields.get(f, "") for f in fields),
                             *(c.figures.get(f, "") for f in figures), c.error or ""])
        return out.getvalue()


def run_whatif(
    study: Study,
    *,
    executor: Executor | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    rank_by: str = "latency_mean_us",
    time_limit_s: float | None = None,
) -> WhatIf:
    """Run every cell that `resume` does not hold yet.

    rank_by: the figure that `WhatIf.ranked` will be asked for; an unknown one is an InputError
    before the first cell runs, not after the last.
    resume: a file of finished cells, one JSON line each, made if absent; cells of other studies in
    it are left alone, failed cells are tried again. progress(done, all) after each cell.
    time_limit_s: after it no further cell is begun; those that were not stand among the failed.
    Raises UsageError where it is not above 0.
    """
    if time_limit_s is not None and not time_limit_s > 0:
        raise UsageError(f"time_limit_s {time_limit_s} must be above 0")
    until = math.inf if time_limit_s is None else time.monotonic() + time_limit_s
    require_figure(rank_by)
    cells = study.grid.cells()
    digest = study.digest()
    path = None if resume is None else Path(resume)
    finished = {} if path is None else finished_cells(path, digest)
    open_cells = [fields for fields in cells if cell_text(fields) not in finished]
    job = functools.partial(run_cell, study)
    asked = itertools.takewhile(lambda _: time.monotonic() < until, open_cells)
    answers = map(job, asked) if executor is None else executor.map(job, asked)
    done = len(cells) - len(open_cells)
    for cell in _told(answers, progress, done, len(cells)):
        finished[cell_text(cell.fields)] = cell
        if path is not None and cell.error is None:
            append_cell(path, digest, cell)
    return WhatIf(tuple(
        finished.get(cell_text(fields)) or Cell(fields, {}, NOT_BEGUN) for fields in cells
    ))


def run_cell(study: Study, fields: dict[str, Any]) -> Cell:
    """Plan and serve one scenario; whatever stops it becomes the cell's `error`."""
    try:
        scenario = study.grid.scenario(fields)
        result, expert_bytes = _serve(study, scenario)
        return Cell(fields, _figures(scenario, result, expert_bytes), notes=result.notes)
    except LoadmasterError as error:
        return Cell(fields, {}, str(error))
    except Exception as error:
        return Cell(fields, {}, f"{type(error).__name__}: {error}")


def require_figure(name: str) -> None:
    """Raises InputError unless cells have such a figure."""
    if name not in FIGURES:
        raise InputError(f"no figure {name!r}; there are: {', '.join(FIGURES)}")


def _serve(study: Study, scenario: Scenario) -> tuple[SimulationResult, int]:
    """(what users saw, bytes of experts on the fullest device)."""
    known, unseen = study.trace.split(EVEN_SHARE, seed=study.grid.seed)
    cluster = _cluster(scenario, study.trace)
    plan = make_plan(known, cluster, method=scenario.method, dispatch=scenario.dispatch,
                     seed=study.grid.seed, model=study.model).plan
    overlap = None if scenario.overlap == "none" else Overlap(scenario.overlap)
    serving = Serving(
        BatchLimits(scenario.step_tokens, min(scenario.max_requests, scenario.step_tokens)),
        study.memory, scenario.groups, overlap,
    )
    slo = study.grid.slo
    result = simulate(
        plan, study.workload.scaled(scenario.load), cluster, trace=unseen, model=study.model,
        dispatch=scenario.dispatch, serving=serving, bank=BANK, seed=study.grid.seed,
        slo=None if slo is None else Slo(slo.ttft_us, slo.tpot_us),
        interventions=study.grid.interventions(scenario),
    )
    return result, int(plan_bytes_G(plan, study.model).max())


def _figures(
    scenario: Scenario, result: SimulationResult, expert_bytes: int
) -> dict[str, float | None]:
    return {
        "latency_mean_us": result.latency.mean, "latency_p99_us": result.latency.p99,
        "ttft_p50_us": result.ttft.p50, "ttft_p99_us": result.ttft.p99,
        "tpot_p50_us": None if result.tpot is None else result.tpot.p50,
        "step_mean_us": result.step_time.mean,
        "output_tokens_per_s": result.output_tokens_per_s,
        "goodput_requests_per_s": result.goodput_requests_per_s,
        "imbalance_mean": result.blame.imbalance_mean,
        "devices": scenario.devices,
        "expert_bytes_per_device": expert_bytes,
    }


def _cluster(scenario: Scenario, trace: RoutingTrace) -> Cluster:
    """The scenario's devices and links."""
    devices = scenario.nodes * scenario.devices_per_node
    slots = scenario.slots_per_device or -(-trace.num_experts // devices)
    cluster = Cluster.preset(
        scenario.preset, nodes=scenario.nodes, devices_per_node=scenario.devices_per_node,
        slots_per_device=slots, traffic=scenario.traffic,
    )
    links = {}
    for side in ("dispatch", "combine"):
        link = getattr(cluster.hardware, side)
        links[side] = link.model_copy(update={
            "nvlink_bytes_per_s": link.nvlink_bytes_per_s * scenario.nvlink,
            "nic_bytes_per_s": link.nic_bytes_per_s * scenario.nic,
        })
    cluster = cluster.model_copy(update={"hardware": cluster.hardware.model_copy(update=links)})
    cluster = cluster.with_reserved(scenario.reserved_bytes)
    if scenario.oversubscription is None:
        return cluster
    return cluster.with_oversubscription(scenario.oversubscription)


def _told(
    answers: Iterable[Cell], progress: Progress | None, done: int, total: int
) -> Iterator[Cell]:
    for count, cell in enumerate(answers, start=done + 1):
        yield cell
        if progress is not None:
            progress(count, total)
