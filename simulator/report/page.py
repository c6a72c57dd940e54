"""The report page: verdict, tables, and what the plans do to loads and traffic.

Knows plans, a trace and their pictures. Fetches nothing and needs no server: the page is one file.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from ...placement.cluster import Cluster
from ...placement.evaluate import imbalance_of
from ...placement.plan import Plan
from ...placement.traffic import step_loads
from ...traces.atomic_file import replacing
from ...traces.steps import Steps
from ...traces.trace import RoutingTrace
from ..traffic_matrix import mean_copies_GG
from .figures import heat_maps, step_lines

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """A table of the page; cells are text already."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    path: Path,
    *,
    title: str,
    verdict: str,
    plans: Mapping[str, Plan],
    trace: RoutingTrace,
    steps: Steps,
    cluster: Cluster,
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the page atomically. The plans are shown side by side on the trace's steps."""
    template = Template(
        resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    )
    text = template.substitute(
        title=html.escape(title),
        verdict=html.escape(verdict),
        tables="\n".join(_table(t) for t in tables),
        figures=_figures(plans, trace, steps, cluster),
        notes="\n".join(f"<li>{html.escape(n)}</li>" for n in notes),
    )
    with replacing(path) as file:
        file.write(text.encode())


def relative_loads(
    plans: Mapping[str, Plan], trace: RoutingTrace, steps: Steps, cluster: Cluster
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """(name -> [L, G] load over the layer's mean device, name -> [W] mean imbalance)."""
    loads, imbalance = {}, {}
    for name, plan in plans.items():
        tokens_WLG = step_loads(trace, steps, plan, cluster).tokens_WLG
        mean_LG = tokens_WLG.mean(axis=0) / cluster.speed_G
        level_L = np.maximum(mean_LG.mean(axis=1, keepdims=True), 1e-12)
        loads[name] = mean_LG / level_L
        imbalance[name] = np.nanmean(imbalance_of(tokens_WLG, cluster), axis=1)
    return loads, imbalance


def _figures(
    plans: Mapping[str, Plan], trace: RoutingTrace, steps: Steps, cluster: Cluster
) -> str:
    loads, imbalance = relative_loads(plans, trace, steps, cluster)
    traffic = {n: mean_copies_GG(trace, steps, p, cluster) for n, p in plans.items()}
    parts = (
        ("Imbalance of every step: busiest device over mean device, mean of layers",
         step_lines(imbalance, quantity="imbalance")),
        ("Load of each device in each layer, over the layer's mean",
         heat_maps(loads, rows="MoE layer", columns="device", scale="load / mean")),
        ("Token copies per step from home device to computing device, all layers",
         heat_maps(traffic, rows="home device", columns="computing device", scale="copies")),
    )
    return "\n".join(f"<h2>{html.escape(said)}</h2>\n{svg}" for said, svg in parts)


def _table(table: Table) -> str:
    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{html.escape(str(v))}</{tag}>" for v in values)

    head = f"<tr>{cells('th', table.columns)}</tr>"
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2>\n<table>\n{head}\n{body}\n</table>"
