"""The report of `simulate`: what users wait under each plan, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...foundation.units import change, digits, duration
from ...placement.cluster import Cluster
from ..serving.compare_served import Served
from ..serving.result import SimulationResult
from .blame_parts import blame_table, layer_picture, layer_tables, time_picture
from .compared_parts import VIEWED, load_picture, traffic_picture
from .report import Picture, Report, Table
from .views import PlanView

MOST_EVENTS = 200            # rows of the events' table


def simulate_report(
    served: Served, views: Callable[[], Sequence[PlanView]], cluster: Cluster,
    notes: Sequence[str] = (),
) -> Report:
    """views: counts those of the plans to show, as `views_of`."""
    ranked = {row.name: served.results[row.name] for row in served.paired.rows}
    blames = {name: r.blame for name, r in ranked.items()}
    return Report(
        title="Simulation", verdict=served.verdict,
        tables=(_users(served, ranked), _service(ranked), blame_table(blames),
                *_events_table(ranked), *layer_tables(blames)),
        judged_on=(
            f"{served.paired.requests} requests, the same under every plan, compared request by "
            f"request and drawn again in stretches of {served.paired.block}",
            VIEWED,
        ),
        notes=tuple(dict.fromkeys((*notes, *served.notes))),
        document=served.to_dict() | {"notes": [*notes, *served.notes]},
        draw=lambda: _pictures(ranked, views(), cluster),
    )


def _pictures(
    ranked: dict[str, SimulationResult], views: Sequence[PlanView], cluster: Cluster
) -> tuple[Picture, ...]:
    blames = {name: r.blame for name, r in ranked.items()}
    pictures = [latency_picture(ranked), time_picture(blames)]
    if any(r.events for r in ranked.values()):
        pictures.append(_events_picture(ranked))
    pictures += [layer_picture(blames), load_picture(views)]
    if cluster.num_devices > 1:
        pictures.append(traffic_picture(views, cluster))
    return tuple(pictures)


def latency_picture(results: Mapping[str, SimulationResult]) -> Picture:
    """What users wait, plan by plan."""
    from .charts.answered_within import answered_within

    return Picture("latency", "What users wait", (
        answered_within({name: r.requests.latency_us for name, r in results.items()}),
    ), "Share of the requests answered within a time; further left is better.")


def _users(served: Served, ranked: dict[str, SimulationResult]) -> Table:
    rows = []
    for behind in served.paired.rows:
        r = ranked[behind.name]
        rows.append((
            behind.name, "best" if behind.best else change(*behind.percent),
            duration(r.latency.mean), duration(r.latency.p50), duration(r.latency.p99),
            duration(r.ttft.p50), duration(r.ttft.p99),
            duration(None if r.tpot is None else r.tpot.p50),
            duration(None if r.tpot is None else r.tpot.p99),
        ))
    header = ("plan", "behind the best", "latency, mean", "p50", "p99", "first token, p50", "p99",
              "per further token, p50", "p99")
    return Table("What users wait", header, tuple(rows))


def _service(ranked: dict[str, SimulationResult]) -> Table:
    header = ("plan", "output tokens/s", "requests/s", "good requests/s", "step, mean", "p99",
              "devices busy", "paused")
    return Table("What the service does", header, tuple(
        (name, digits(r.output_tokens_per_s), digits(r.requests_per_s),
         digits(r.goodput_requests_per_s), duration(r.step_time.mean), duration(r.step_time.p99),
         f"{float(r.device_busy_G.mean()):.1%}", duration(r.paused_us))
        for name, r in ranked.items()
    ))


def _events_table(ranked: dict[str, SimulationResult]) -> list[Table]:
    rows = [
        (name, f"{e.at_us / 1e6:,.3f} s", e.kind, e.detail, duration(e.pause_us))
        for name, r in ranked.items() for e in r.events
    ]
    if not rows:
        return []
    title = "What happened"
    if len(rows) > MOST_EVENTS:
        title += f", the first {MOST_EVENTS} of {len(rows):,}"
    return [Table(title, ("plan", "at", "what", "detail", "pause"), tuple(rows[:MOST_EVENTS]),
                  folded=len(rows) > 12)]


def _events_picture(ranked: dict[str, SimulationResult]) -> Picture:
    from .charts.over_time import Mark, over_time

    lines = {
        name: (r.steps.start_ns / 1e9, r.steps.duration_ns / 1e6) for name, r in ranked.items()
    }
    first = next(iter(ranked.values()))
    marks = [Mark(e.at_us / 1e6, e.kind, e.detail) for e in first.events[:MOST_EVENTS]]
    return Picture(
        "events", "Step time, and what happened", (
            over_time(lines, marks, x="time, s", y="step, ms"),
        ), f"Marks are those of {next(iter(ranked))}.",
    )
