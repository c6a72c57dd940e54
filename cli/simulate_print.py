"""How `simulate` and `replay` say what came out: times, where they went, what happened."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from . import output as show

if TYPE_CHECKING:
    from ..simulator.pricing.attribution import Blame
    from ..simulator.serving.compare_served import Served
    from ..simulator.serving.result import SimulationResult

USERS = ("plan", "% behind best", "latency mean", "p50", "p99", "first token p50", "p99",
         "per token p50", "p99")
SERVICE = ("plan", "output tokens/s", "requests/s", "good requests/s", "step mean, ms", "p99",
           "devices busy", "paused, s")
MOST_EVENTS_SHOWN = 20       # of each plan


def print_served(served: Served, notes: tuple[str, ...]) -> None:
    """Verdict, times, blame, events, notes."""
    show.print_verdict(served.verdict)
    rows = served.paired.rows
    show.print_table("what users wait, milliseconds", USERS, _user_rows(served))
    show.print_table("what the service does", SERVICE, [
        _service_row(row.name, served.results[row.name]) for row in rows
    ])
    print_blame({row.name: served.results[row.name].blame for row in rows})
    _print_events(served)
    show.print_notes((*_band_notes(served), *notes, *served.notes))


def _user_rows(served: Served) -> list[tuple[Any, ...]]:
    """Best mean latency first."""
    rows = []
    for behind in served.paired.rows:
        r = served.results[behind.name]
        per_token = (None, None) if r.tpot is None else (r.tpot.p50 / 1e3, r.tpot.p99 / 1e3)
        rows.append((
            behind.name, "best" if behind.best else show.band(*behind.percent),
            r.latency.mean / 1e3, r.latency.p50 / 1e3, r.latency.p99 / 1e3, r.ttft.p50 / 1e3,
            r.ttft.p99 / 1e3, *per_token,
        ))
    return rows


def _service_row(name: str, r: SimulationResult) -> tuple[Any, ...]:
    return (
        name, r.output_tokens_per_s, r.requests_per_s, r.goodput_requests_per_s,
        r.step_time.mean / 1e3, r.step_time.p99 / 1e3, float(r.device_busy_G.mean()),
        r.paused_us / 1e6,
    )


def print_blame(blames: Mapping[str, Blame]) -> None:
    """What each cause costs in per cent of the step, and who sets the pace most often."""
    causes = [
        cause for cause in next(iter(blames.values())).shares
        if cause != "jitter" or any(b.shares[cause] > 0 for b in blames.values())
    ]
    rows = []
    for name, blame in blames.items():
        device, in_layers = blame.slowest_device
        port, sets = blame.worst_port
        rows.append((
            name, *(f"{100 * blame.shares[cause]:.1f}" for cause in causes),
            f"{device} ({100 * in_layers:.0f} %)",
            port if port == "none" else f"{port} ({100 * sets:.0f} %)",
        ))
    show.print_table(
        "where a step's time goes, %; who sets it most often, and in how many layers",
        ("plan", *causes, "slowest device", "busiest port"), rows,
    )


def _print_events(served: Served) -> None:
    """Faults, switches and decisions of a policy; what repeats is printed once."""
    rows: list[tuple[Any, ...]] = []
    left = 0
    for name, result in served.results.items():
        runs = [list(run) for _, run in groupby(result.events, key=lambda e: (e.kind, e.detail))]
        rows += [
            (name, run[0].at_us / 1e6, len(run), run[0].kind, run[0].detail,
             sum(e.pause_us for e in run) / 1e3)
            for run in runs[:MOST_EVENTS_SHOWN]
        ]
        left += sum(map(len, runs[MOST_EVENTS_SHOWN:]))
    if rows:
        show.print_table(
            "what happened", ("plan", "from, s", "times", "what", "", "paused, ms"), rows
        )
    if left:
        show.print_notes([f"{left} more happened: --json lists all"])


def _band_notes(served: Served) -> tuple[str, ...]:
    paired = served.paired
    if len(paired.rows) == 1:
        return ()
    return (
        f"± is a 95 % band over the {paired.requests} requests, paired, drawn again in stretches "
        f"of {paired.block}; other arrivals or another trace may differ more",
    )
