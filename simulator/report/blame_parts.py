"""The parts of a report that say where time goes: by cause, by layer."""

from __future__ import annotations

from collections.abc import Mapping

from ...foundation.units import duration, percent
from ..pricing.attribution import Blame
from .report import Picture, Table

CAUSES = {
    "compute": "experts, perfectly balanced", "placement": "waiting: placement",
    "dispatch": "waiting: dispatch", "jitter": "waiting: jitter", "network": "network",
    "other": "outside the experts",
}
MOST_BY_LAYER = 2            # plans shown layer by layer as pictures; tables have all


def time_picture(blames: Mapping[str, Blame]) -> Picture:
    """A mean step of each plan, by cause."""
    from .charts.time_parts import time_parts

    parts_us = {
        name: {CAUSES.get(cause, cause): share * b.step_us for cause, share in b.shares.items()}
        for name, b in blames.items()
    }
    return Picture(
        "time", "Where a step's time goes", (time_parts(parts_us),),
        "Waiting is for the slowest device of a layer: by placement (no dispatch of this plan "
        "could avoid it), by dispatch, and by devices' random slowness.",
    )


def blame_table(blames: Mapping[str, Blame]) -> Table:
    """The same as figures, and who sets the pace most often."""
    causes = [c for c in next(iter(blames.values())).shares
              if any(b.shares[c] for b in blames.values())]
    header = ("plan", "mean step", "experts' critical path", "imbalance, mean", "p99",
              *(CAUSES.get(c, c) for c in causes), "slowest device", "busiest port")
    rows = []
    for name, b in blames.items():
        device, in_layers = b.slowest_device
        port, sets = b.worst_port
        rows.append((
            name, duration(b.step_us), duration(b.critical_path_us), f"{b.imbalance_mean:.3f}",
            f"{b.imbalance_p99:.3f}", *(percent(b.shares[c]) for c in causes),
            f"{device} ({in_layers:.0%} of layers)",
            port if port == "none" else f"{port} ({sets:.0%})",
        ))
    return Table("Where a step's time goes", header, tuple(rows))


def layer_picture(blames: Mapping[str, Blame]) -> Picture:
    """Layer by layer, of the first plans."""
    from .charts.layer_blame import layer_blame

    shown = list(blames.items())[:MOST_BY_LAYER]
    return Picture("layers", "Blame, layer by layer",
                   tuple(layer_blame(b.layers, name) for name, b in shown))


def layer_tables(blames: Mapping[str, Blame]) -> list[Table]:
    """Layer by layer as figures, folded."""
    header = ("layer", "time", "slowest device", "in % of steps", "experts, mean device",
              "slowest", "dispatch", "combine", "port that sets the dispatch")
    return [
        Table(f"{name}, layer by layer", header, tuple(
            (str(b.layer), duration(b.layer_us), str(b.slowest_device),
             percent(b.slowest_device_share), duration(b.mean_compute_us),
             duration(b.slowest_compute_us), duration(b.dispatch_us), duration(b.combine_us),
             b.port)
            for b in blame.layers
        ), folded=True)
        for name, blame in blames.items()
    ]
