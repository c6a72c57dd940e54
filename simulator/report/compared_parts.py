"""What every report of compared plans has: its table, its pictures, what it was judged on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...foundation.units import change, digits, duration
from ...placement.cluster import Cluster
from ...placement.comparison.compare import Comparison, ComparisonRow
from .report import Picture, Table
from .views import PlanView

TIME = "step_time_us"
HOTTEST = 2.0                # of the load colours: twice the mean and above look alike
VIEWED = "loads and traffic: up to 16 steps spread evenly over the trace"


def metric_text(value: float, name: str) -> str:
    """A comparison's figure: a time in its unit, an imbalance with three decimals."""
    return duration(value) if name == TIME else f"{value:.3f}"


def metric_title(name: str) -> str:
    """What the figure is called."""
    return {TIME: "step time", "peak_mean": "busiest device over perfect balance"}.get(
        name, "imbalance"
    )


def compared_table(table: Comparison, nodes: int) -> Table:
    """A row a plan, best first."""
    header = ("plan", metric_title(table.metric_name), "95 % band", f"against {table.reference}",
              "imbalance, mean", "p99", "worst",
              f"transfers between {'nodes' if nodes > 1 else 'devices'}, per token and layer",
              "active experts a device")
    rows = []
    for row in table.rows:
        own = table.evaluations[row.name]
        copies = (own.remote_node_copies_per_token if nodes > 1
                  else own.remote_device_copies_per_token)
        rows.append((
            row.name, metric_text(row.metric, table.metric_name), _reach(row, table.metric_name),
            "-" if row.name == table.reference else change(
                row.change_percent, row.change_low_percent, row.change_high_percent),
            f"{own.imbalance_mean:.3f}", f"{own.imbalance_p99:.3f}", f"{own.imbalance_worst:.3f}",
            digits(copies), digits(own.active_experts_per_device),
        ))
    return Table("The plans, best first", header, tuple(rows))


def _reach(row: ComparisonRow, name: str) -> str:
    reach = (row.metric_high - row.metric_low) / 2
    return f"± {metric_text(reach, name)}" if np.isfinite(reach) else "± ?"


def compared_spread(table: Comparison) -> Picture:
    """The figure that decides, in every step of every plan."""
    from .charts.spread import PerStep, spread

    timed = table.metric_name == TIME
    plans = {}
    for row in table.rows:
        own = table.evaluations[row.name]
        if timed and own.step_time_us_W is not None:
            value_W, scale = own.step_time_us_W / 1e3, 1e-3
        else:
            with np.errstate(invalid="ignore"):
                held = np.isfinite(own.peak_WL).any(axis=1)
            value_W, scale = np.nanmean(own.peak_WL[held], axis=1), 1.0
        plans[row.name] = PerStep(value_W, row.metric_low * scale, row.metric_high * scale)
    title = metric_title(table.metric_name) + (", ms" if timed else "")
    return Picture(
        "steps", f"{title[0].upper()}{title[1:]} in every step",
        (spread(plans, title),),
        "Thin line: 1st to 99th percentile of the steps; thick: the middle half; dot: the mean, "
        "with its 95 % band in full colour.",
    )


def load_picture(views: Sequence[PlanView]) -> Picture:
    """Load over layer and device, before and after, in the same colours."""
    from .charts.load_map import load_map

    highest = min(HOTTEST, max(float(v.load_LG.max()) for v in views))
    return Picture(
        "load", "Load of every device in every layer",
        tuple(load_map(v.load_LG, v.name, highest) for v in views),
        "Over the layer's mean: pale is level, orange is what the others wait for. The same "
        "colours in every picture.",
    )


def traffic_picture(views: Sequence[PlanView], cluster: Cluster) -> Picture:
    """Who sends to whom, before and after, in the same colours."""
    from .charts.traffic_map import traffic_map

    highest = max(float(v.traffic_GG[~np.eye(len(v.traffic_GG), dtype=bool)].max(initial=0))
                  for v in views)
    return Picture(
        "traffic", "Traffic between devices",
        tuple(traffic_map(v.traffic_GG, np.asarray(cluster.node_G), v.name, highest)
              for v in views),
        "Token transfers of a step, all layers together, as dispatched" + (
            "; white lines part the nodes." if cluster.num_nodes > 1 else "."),
    )


def judged_on(table: Comparison) -> tuple[str, ...]:
    """Steps, what they are worth, how the bands were made."""
    return (
        f"{table.steps} steps, worth {table.independent_steps:.0f} independent ones",
        f"bands: {table.method}, {table.resamples} resamples",
    )
