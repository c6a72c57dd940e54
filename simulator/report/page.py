"""One self-contained HTML file: verdict, tables, load heat maps, traffic matrices, blame.

Knows finished results and views. Knows nothing of how they were computed. Nothing is fetched: style
and pictures are inside the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ...foundation.atomic_file import replacing
from ..serving.result import SimulationResult
from .svg import distribution_curves, heat_map, rows_of, stacked_bars
from .views import PlanView

HOTTEST = 2.0    # of the load colours: twice the mean and above are red


@dataclass(frozen=True)
class Table:
    """A titled table of texts."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render_report(
    *,
    title: str,
    verdict: str,
    views: Sequence[PlanView] = (),
    results: Mapping[str, SimulationResult] | None = None,
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page as text. Sections without content are left out."""
    parts = [_table(t) for t in tables]
    if results:
        parts += [_served(results), _where_time_goes(results), _layers(results)]
    if views:
        parts += [_loads(views), _traffic(views)]
    texts = [*notes, *(n for r in (results or {}).values() for n in r.notes)]
    if texts:
        items = "".join(f"<li>{escape(t)}</li>" for t in dict.fromkeys(texts))
        parts.append(f'<h2>Notes</h2><ul class="notes">{items}</ul>')
    page = Template(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    return page.substitute(title=escape(title), verdict=escape(verdict), body="\n".join(parts))


def write_report(path: str | Path, text: str) -> None:
    """Write the page whole or not at all."""
    with replacing(Path(path)) as file:
        file.write(text.encode())


def _table(table: Table) -> str:
    return f"<h2>{escape(table.title)}</h2>{rows_of(table.header, table.rows)}"


def _served(results: Mapping[str, SimulationResult]) -> str:
    header = ("plan", "latency p50, ms", "p99", "first token p50, ms", "p99",
              "per further token p50, ms", "output tokens/s", "mean step, ms")
    rows = [
        (name, _ms(r.latency.p50), _ms(r.latency.p99), _ms(r.ttft.p50), _ms(r.ttft.p99),
         "-" if r.tpot is None else _ms(r.tpot.p50), f"{r.output_tokens_per_s:,.0f}",
         _ms(r.step_time.mean))
        for name, r in results.items()
    ]
    curves = distribution_curves(
        {name: r.requests.latency_us / 1e3 for name, r in results.items()},
        title="Share of requests answered within", unit="ms",
    )
    events = [
        (name, f"{e.at_us / 1e6:.3f}", e.kind, e.detail, _ms(e.pause_us))
        for name, r in results.items() for e in r.events
    ]
    switches = rows_of(("plan", "at, s", "what", "detail", "pause, ms"), events) if events else ""
    return f"<h2>What users saw</h2>{rows_of(header, rows)}{curves}{switches}"


def _where_time_goes(results: Mapping[str, SimulationResult]) -> str:
    shares = {
        name: {part: 100 * share for part, share in r.blame.shares.items()}
        for name, r in results.items()
    }
    header = ("plan", "mean step, ms", "expert critical path, ms", "imbalance mean", "p99",
              *next(iter(shares.values())))
    rows = [
        (name, _ms(r.blame.step_us), _ms(r.blame.critical_path_us),
         f"{r.blame.imbalance_mean:.3f}", f"{r.blame.imbalance_p99:.3f}",
         *(f"{value:.1f} %" for value in shares[name].values()))
        for name, r in results.items()
    ]
    bars = stacked_bars(shares, title="Per cent of a mean step: experts at perfect balance, "
                                      "waits for placement, dispatch and jitter, network, other")
    return f"<h2>Where a step's time goes</h2>{bars}{rows_of(header, rows)}"


def _layers(results: Mapping[str, SimulationResult]) -> str:
    header = ("layer", "time, us", "slowest device", "in % of steps", "experts mean, us",
              "slowest, us", "dispatch, us", "combine, us", "port that sets the dispatch")
    parts = []
    for name, r in results.items():
        rows = [
            (str(b.layer), f"{b.layer_us:.1f}", str(b.slowest_device),
             f"{100 * b.slowest_device_share:.0f}", f"{b.mean_compute_us:.1f}",
             f"{b.slowest_compute_us:.1f}", f"{b.dispatch_us:.1f}", f"{b.combine_us:.1f}", b.port)
            for b in r.blame.layers
        ]
        parts.append(f"<details><summary>{escape(name)}, layer by layer</summary>"
                     f"{rows_of(header, rows)}</details>")
    return "".join(parts)


def _loads(views: Sequence[PlanView]) -> str:
    maps = "".join(
        heat_map(v.load_LG, rows="layer", columns="device", middle=1.0, highest=HOTTEST,
                 title=f"{v.name}: load over the layer's mean")
        for v in views
    )
    return f'<h2>Load of devices, layer by layer</h2><div class="pair">{maps}</div>'


def _traffic(views: Sequence[PlanView]) -> str:
    mean = max(float(v.traffic_GG.mean()) for v in views)
    most = max(float(v.traffic_GG.max()) for v in views)
    maps = "".join(
        heat_map(v.traffic_GG, rows="from rank", columns="to device", middle=mean,
                 highest=max(most, mean), title=f"{v.name}: token transfers per step")
        for v in views
    )
    return f'<h2>Traffic between devices</h2><div class="pair">{maps}</div>'


def _ms(us: float) -> str:
    return f"{us / 1e3:,.3f}"
