"""Blame: which device, layer and port cost the time, and what placement, dispatch and network cost.

Takes weighted routed steps. Knows times. Knows nothing of requests or clocks.

The slowest device's wait in a layer is split by asking what the same plan would take under the best
split of the step's tokens: that far it is the dispatch's doing; from there to perfect balance it is
the placement's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...foundation.arrays import FloatArray
from ...placement.cost.step_cost import port_name
from .step_router import PORT_KINDS, PORTS, RoutedSteps

# What else could have split the same tokens: the flattest split, and the fewest weight reads.
OTHER_DISPATCHES = ("balanced", "fewest_active")


@dataclass(frozen=True)
class LayerBlame:
    """One layer, mean microseconds per step, and who set its time most often."""

    layer: int
    layer_us: float
    mean_compute_us: float
    slowest_compute_us: float
    dispatch_us: float
    combine_us: float
    slowest_device: int
    slowest_device_share: float      # of step time in which it is that device
    port: str                        # "nic_in of device 3", or "none" where nothing is sent
    port_share: float


@dataclass(frozen=True)
class Blame:
    """Where the time of a mean step goes.

    shares: parts of the step, summing to 1: compute (at perfect balance), placement, dispatch (both
    waits for the slowest device), jitter (what devices' random slowness adds), network (exchange
    that no overlap hides), other (outside the expert layers). Negative network:
    overlap hides more than the exchange's own time.
    """

    step_us: float
    critical_path_us: float          # sum over layers of the slowest device's expert time
    imbalance_mean: float
    imbalance_p99: float
    shares: dict[str, float]
    layers: tuple[LayerBlame, ...]
    slowest_share_G: tuple[float, ...]
    judged_steps: int                # routed steps that `placement` and `dispatch` were split on

    @property
    def slowest_device(self) -> tuple[int, float]:
        """(the device that most often sets a layer's time, the share of layers it does)."""
        device = int(np.argmax(self.slowest_share_G))
        return device, self.slowest_share_G[device]

    @property
    def worst_port(self) -> tuple[str, float]:
        """(the port that sets the exchange of most layers, the share of layers it does)."""
        share: dict[str, float] = {}
        for layer in self.layers:
            share[layer.port] = share.get(layer.port, 0.0) + layer.port_share / len(self.layers)
        port = max(share, key=lambda name: share[name])
        return port, share[port]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {
            "step_us": self.step_us,
            "critical_path_us": self.critical_path_us,
            "imbalance_mean": self.imbalance_mean,
            "imbalance_p99": self.imbalance_p99,
            "shares": dict(self.shares),
            "slowest_share": [round(s, 6) for s in self.slowest_share_G],
            "judged_steps": self.judged_steps,
            "layers": [vars(layer) for layer in self.layers],
        }


class Usage:
    """Adds up routed steps, each with a weight (how often it ran)."""

    def __init__(self, num_layers: int, num_devices: int) -> None:
        shape = (num_layers, num_devices)
        self.weight = 0.0
        self.step_us = self.jitter_us = 0.0
        self.layer_us, self.dispatch_us, self.combine_us, self.slowest_us = (
            np.zeros(num_layers) for _ in range(4)
        )
        self.compute_us_LG, self.slowest_LG = np.zeros(shape), np.zeros(shape)
        self.port_us_PG = np.zeros((len(PORTS), num_devices))
        self.port_LX = np.zeros((num_layers, PORT_KINDS * num_devices))
        self.imbalance: list[tuple[FloatArray, float]] = []
        self.notes: dict[str, None] = {}

    def add(self, routed: RoutedSteps, weight_N: FloatArray) -> None:
        """Count step n weight_N[n] times."""
        used = np.flatnonzero(weight_N > 0)
        if not len(used):
            return
        self.notes.update(dict.fromkeys(routed.notes))
        weight = weight_N[used]
        compute = routed.compute_us[used].astype(np.float64)
        self.weight += float(weight.sum())
        self.step_us += float(weight @ routed.step_us[used])
        self.layer_us += weight @ routed.layer_us[used]
        self.dispatch_us += weight @ routed.dispatch_us[used]
        self.combine_us += weight @ routed.combine_us[used]
        self.slowest_us += weight @ compute.max(axis=2)
        self.compute_us_LG += np.tensordot(weight, compute, axes=1)
        self.port_us_PG += np.tensordot(weight, routed.port_us[used], axes=1)
        layers = np.arange(compute.shape[1])
        for n, w in zip(used.tolist(), weight.tolist(), strict=True):
            self.slowest_LG[layers, routed.compute_us[n].argmax(axis=1)] += w
            port = routed.port_of_layer[n]
            sent = port >= 0
            self.port_LX[layers[sent], port[sent]] += w
            self.imbalance.append((routed.imbalance[n], w))

    def add_beside(self, jitter_us: float, own_us: float) -> None:
        """Time that the routed steps do not hold: jitter, and work outside the expert layers."""
        self.jitter_us += jitter_us
        self.step_us += jitter_us + own_us

    def blame(self, split: WaitSplit | None) -> Blame:
        """The mean step's account. `split` as judged on some of the steps; None = all placement's.

        Raises ValueError when nothing was added.
        """
        if self.weight <= 0:
            raise ValueError("no step was added")
        per_step = 1.0 / self.weight
        step_us = self.step_us * per_step
        ideal_us = float(self.compute_us_LG.mean(axis=1).sum()) * per_step
        critical_us = float(self.slowest_us.sum()) * per_step
        wait_us = critical_us - ideal_us
        dispatch_part = split.dispatch_part if split else 0.0
        layers_us = float(self.layer_us.sum()) * per_step
        jitter_us = self.jitter_us * per_step
        values, weights = self._imbalance()
        shares = {
            "compute": ideal_us / step_us,
            "placement": wait_us * (1.0 - dispatch_part) / step_us,
            "dispatch": wait_us * dispatch_part / step_us,
            "jitter": jitter_us / step_us,
            "network": (layers_us - critical_us) / step_us,
            "other": max(0.0, 1.0 - (layers_us + jitter_us) / step_us),
        }
        slowest_G = self.slowest_LG.sum(axis=0) * per_step / len(self.layer_us)
        return Blame(
            step_us, critical_us, float(np.average(values, weights=weights)),
            _weighted_quantile(values, weights, 0.99), shares, self._layers(per_step),
            tuple(slowest_G.tolist()), split.steps if split else 0,
        )

    def _imbalance(self) -> tuple[FloatArray, FloatArray]:
        values = np.concatenate([v for v, _ in self.imbalance])
        weights = np.repeat([w for _, w in self.imbalance], len(self.layer_us))
        counts = np.isfinite(values)
        return values[counts], weights[counts]

    def _layers(self, per_step: float) -> tuple[LayerBlame, ...]:
        devices = self.slowest_LG.shape[1]
        rows = []
        for layer in range(len(self.layer_us)):
            slowest = int(self.slowest_LG[layer].argmax())
            port = int(self.port_LX[layer].argmax())
            sent = self.port_LX[layer, port]
            name = port_name(port if sent > 0 else -1, devices)
            rows.append(LayerBlame(
                layer, float(self.layer_us[layer] * per_step),
                float(self.compute_us_LG[layer].mean() * per_step),
                float(self.slowest_us[layer] * per_step),
                float(self.dispatch_us[layer] * per_step),
                float(self.combine_us[layer] * per_step),
                slowest, float(self.slowest_LG[layer, slowest] * per_step),
                name, float(sent * per_step),
            ))
        return tuple(rows)


@dataclass(frozen=True)
class WaitSplit:
    """Which part of the waiting the dispatch could have avoided, and on how many steps judged."""

    dispatch_part: float
    steps: int


def split_wait(
    actual: RoutedSteps, alternatives: list[RoutedSteps], weight_N: FloatArray
) -> WaitSplit:
    """The same steps under the plan's dispatch and under others; the best of all counts.

    Chosen per layer: the slowest device's time under the best of the policies.
    """
    slowest = actual.compute_us.max(axis=2).astype(np.float64)
    best = slowest
    for other in alternatives:
        best = np.minimum(best, other.compute_us.max(axis=2))
    wait = float(weight_N @ (slowest - actual.compute_us.mean(axis=2)).sum(axis=1))
    avoidable = float(weight_N @ (slowest - best).sum(axis=1))
    part = min(1.0, avoidable / wait) if wait > 0 else 0.0
    return WaitSplit(part, len(weight_N))


def _weighted_quantile(values: FloatArray, weights: FloatArray, q: float) -> float:
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order])
    at = int(np.searchsorted(cumulative, q * cumulative[-1]))
    return float(values[order][min(at, len(values) - 1)])
