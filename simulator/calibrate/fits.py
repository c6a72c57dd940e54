"""Fits device and link parameters to measured tables, and says how far each fit is off.

Takes arrays of timed rows (`measured.py`); returns profiles that `placement/hardware.py` holds.
Knows nothing of where rows came from; the machine at hand, timed point by point, is
`machine.py`'s. Interpolates linearly, never in log space; clamps and flags what lies outside the
measured range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...placement.hardware import ComputeProfile, ExchangeProfile
from ..random_streams import stream
from .measurements import ExchangeRows, ExpertRows

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

TILE_TOKENS = 64.0    # grouped kernels round each expert's tokens up to a tile


@dataclass(frozen=True)
class FitError:
    """Relative error of a fit: |predicted / measured - 1|, over `rows` rows."""

    rows: int
    median: float
    p90: float
    worst: float

    @classmethod
    def of(cls, predicted: FloatArray, measured: FloatArray) -> FitError:
        """Raises InputError when there is nothing to compare."""
        if not len(measured):
            raise InputError("no rows to check the fit against")
        error = np.abs(predicted / measured - 1.0)
        return cls(len(error), float(np.median(error)), float(np.quantile(error, 0.9)),
                   float(error.max()))

    def __str__(self) -> str:
        return f"median {self.median:.1%}, p90 {self.p90:.1%}, worst {self.worst:.1%}"

    def to_dict(self) -> dict[str, Any]:
        """The four figures by name."""
        return {"rows": self.rows, "median": self.median, "p90": self.p90, "worst": self.worst}


@dataclass(frozen=True, eq=False)
class ExpertLayerFit:
    """Time of a device's experts from counts: additive terms x a correction per batch size.

    us = (start + active x (weights / hbm + tile / 2 x flop time) + assignments x flop time)
    x correction(tokens). Kernels change their tiling with the batch; `correction` is a table
    of measured over additive, linear in tokens, held at its ends.
    """

    start_us: float
    active_byte_us: float
    tile_flop_us: float
    flop_us: float
    correction_tokens: FloatArray
    correction: FloatArray
    error: FitError

    def additive_us(self, rows: ExpertRows) -> FloatArray:
        """[M] the additive terms alone."""
        terms = np.array([self.start_us, self.active_byte_us, self.tile_flop_us, self.flop_us])
        predicted: FloatArray = _expert_terms(rows) @ terms
        return predicted

    def predict_us(self, rows: ExpertRows) -> FloatArray:
        """[M] predicted times."""
        factor = np.interp(rows.tokens, self.correction_tokens, self.correction)
        return self.additive_us(rows) * factor

    def extrapolates(self, rows: ExpertRows) -> BoolArray:
        """[M] which rows have fewer or more tokens than any that was fitted."""
        low, high = self.correction_tokens[0], self.correction_tokens[-1]
        outside: BoolArray = (rows.tokens < low) | (rows.tokens > high)
        return outside


def fit_expert_layer(rows: ExpertRows) -> ExpertLayerFit:
    """Fit one label's rows by least squares of the relative error, no term below zero.

    Raises InputError on fewer than 4 rows.
    """
    if len(rows) < 4:
        raise InputError(f"{len(rows)} rows of {rows.label[:1]}: a fit needs at least 4")
    coefficients = relative_nnls(_expert_terms(rows), rows.us)
    ratio = rows.us / (_expert_terms(rows) @ coefficients)
    tokens, at = np.unique(rows.tokens, return_inverse=True)
    correction = np.bincount(at, weights=ratio) / np.bincount(at)
    predicted = rows.us / ratio * correction[at]
    start_us, active_byte_us, tile_flop_us, flop_us = (float(c) for c in coefficients)
    return ExpertLayerFit(start_us, active_byte_us, tile_flop_us, flop_us, tokens, correction,
                          FitError.of(predicted, rows.us))


def fit_expert_layers(rows: ExpertRows) -> dict[str, ExpertLayerFit]:
    """One fit per label."""
    labels = np.array(rows.label)
    return {
        str(label): fit_expert_layer(rows.take(np.flatnonzero(labels == label)))
        for label in np.unique(labels)
    }


def predict_expert_layers(fits: dict[str, ExpertLayerFit], rows: ExpertRows) -> FloatArray:
    """[M] each row by its label's fit. Raises InputError on a label that was not fitted."""
    predicted = np.empty(len(rows))
    labels = np.array(rows.label)
    for label in np.unique(labels):
        if label not in fits:
            raise InputError(f"nothing was fitted for {label}; there are: {', '.join(fits)}")
        chosen = np.flatnonzero(labels == label)
        predicted[chosen] = fits[label].predict_us(rows.take(chosen))
    return predicted


def hold_back_half(groups: Sequence[str], *, seed: int) -> tuple[IntArray, IntArray]:
    """(kept, held back): half of the rows of every group, drawn at random; odd rows are kept."""
    names = np.array(groups)
    rng = stream(seed, "hold back")
    kept, held = [], []
    for name in np.unique(names):
        order = rng.permutation(np.flatnonzero(names == name))
        half = len(order) // 2
        held.append(order[:half])
        kept.append(order[half:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def fit_compute_profile(rows: ExpertRows) -> tuple[ComputeProfile, FitError]:
    """start, HBM rate and flop rate of one device and format, for `step_cost`.

    Raises InputError when the rows cannot tell the rates apart (all of one size).
    """
    terms = _expert_terms(rows)[:, [0, 1, 3]]
    start_us, byte_us, flop_us = relative_nnls(terms, rows.us)
    if byte_us <= 0 or flop_us <= 0:
        raise InputError(
            "the rows do not tell weight reads from arithmetic: time few tokens on many experts "
            "and many tokens on few"
        )
    profile = ComputeProfile(
        start_us=float(start_us), hbm_bytes_per_s=1e6 / float(byte_us),
        flops_per_s=1e6 / float(flop_us),
    )
    return profile, FitError.of(terms @ np.array([start_us, byte_us, flop_us]), rows.us)


@dataclass(frozen=True)
class ExchangeFit:
    """alpha + alpha_per_log2_node x log2(nodes) + bytes / rate, fitted to one direction."""

    alpha_us: float
    alpha_per_log2_node_us: float
    bytes_per_s: float
    nodes_seen: tuple[float, float]
    bytes_seen: tuple[float, float]
    error: FitError

    def predict_us(self, nodes: npt.ArrayLike, port_bytes: npt.ArrayLike) -> FloatArray:
        """Microseconds of an exchange of `nodes` with `port_bytes` on its most loaded port."""
        log_nodes = np.log2(np.asarray(nodes, np.float64))
        transfer_us = np.asarray(port_bytes, np.float64) / self.bytes_per_s * 1e6
        us: FloatArray = self.alpha_us + self.alpha_per_log2_node_us * log_nodes + transfer_us
        return us

    def extrapolates(self, nodes: npt.ArrayLike, port_bytes: npt.ArrayLike) -> BoolArray:
        """Which points lie outside the nodes or bytes that were fitted."""
        n, b = np.asarray(nodes, np.float64), np.asarray(port_bytes, np.float64)
        outside: BoolArray = (
            (n < self.nodes_seen[0]) | (n > self.nodes_seen[1])
            | (b < self.bytes_seen[0]) | (b > self.bytes_seen[1])
        )
        return outside


def fit_exchange(rows: ExchangeRows) -> ExchangeFit:
    """Least squares of the relative error, no parameter below zero.

    Raises InputError when the rows hold one size only.
    """
    log_nodes = np.log2(np.maximum(rows.nodes, 1.0))
    terms = np.stack([np.ones(len(rows)), log_nodes, rows.port_bytes * 1e6], axis=1)
    alpha_us, per_node_us, byte_s = relative_nnls(terms, rows.us)
    if byte_s <= 0:
        raise InputError("the rows do not show a rate: time at least two sizes, one of them large")
    return ExchangeFit(
        float(alpha_us), float(per_node_us), 1.0 / float(byte_s),
        (float(rows.nodes.min()), float(rows.nodes.max())),
        (float(rows.port_bytes.min()), float(rows.port_bytes.max())),
        FitError.of(terms @ np.array([alpha_us, per_node_us, byte_s]), rows.us),
    )


def exchange_profile(
    nvlink: ExchangeFit, nic: ExchangeFit | None = None, *, nic_bytes_per_s: float = 50e9
) -> ExchangeProfile:
    """One direction's profile; the network's start where it was fitted, else the node's."""
    far = nic or nvlink
    return ExchangeProfile(
        alpha_us=far.alpha_us,
        alpha_per_log2_node_us=far.alpha_per_log2_node_us if nic else 0.0,
        nvlink_bytes_per_s=nvlink.bytes_per_s,
        nic_bytes_per_s=nic.bytes_per_s if nic else nic_bytes_per_s,
    )


def _expert_terms(rows: ExpertRows) -> FloatArray:
    """[M, 4] start, weight bytes of active experts, flops lost to half-full tiles, flops."""
    flops = rows.flops_per_assignment
    return np.stack(
        [np.ones(len(rows)), rows.active * rows.expert_bytes,
         rows.active * TILE_TOKENS / 2 * flops, rows.assignments * flops],
        axis=1,
    )


def relative_nnls(terms_MP: FloatArray, us_M: FloatArray) -> FloatArray:
    """[P] non-negative coefficients that minimise the squared relative error."""
    from scipy.optimize import nnls

    scaled = terms_MP / us_M[:, None]
    size = np.abs(scaled).max(axis=0)
    size[size == 0] = 1.0
    coefficients, _ = nnls(scaled / size, np.ones(len(us_M)))
    fitted: FloatArray = coefficients / size
    return fitted
