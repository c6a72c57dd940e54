"""A link's start and rate fitted to timed exchanges, and how far a fit is off.

Takes rows of measurements, by column name; returns figures that `machine_profile.py` puts into a
profile. Knows nothing of where rows came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from ...foundation.arrays import FloatArray


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


@dataclass(frozen=True, eq=False)
class ExchangeRows:
    """Timed all-to-alls, [M] each: nodes, bytes on the most loaded port, microseconds."""

    nodes: FloatArray
    port_bytes: FloatArray
    us: FloatArray

    def __len__(self) -> int:
        return len(self.us)


def exchange_rows_from(rows: Iterable[Mapping[str, object]]) -> ExchangeRows:
    """Rows of timed exchanges: nodes, port_bytes, latency_us."""
    table = list(rows)
    return ExchangeRows(
        column(table, "nodes"), column(table, "port_bytes"), positive(table, "latency_us")
    )


@dataclass(frozen=True)
class ExchangeFit:
    """alpha + alpha_per_log2_node x log2(nodes) + bytes / rate, fitted to one direction."""

    alpha_us: float
    alpha_per_log2_node_us: float
    bytes_per_s: float
    error: FitError


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
        FitError.of(terms @ np.array([alpha_us, per_node_us, byte_s]), rows.us),
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


def column(table: list[Mapping[str, object]], *names: str) -> FloatArray:
    values = np.empty(len(table))
    for i, row in enumerate(table):
        text = next((row[n] for n in names if row.get(n) not in (None, "")), None)
        try:
            values[i] = float(text)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"row {i}: column {' or '.join(names)} holds {text!r}, not a number"
            ) from error
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        i = int(np.argmax(bad))
        raise InputError(f"row {i}: column {names[0]} holds {values[i]}: must be finite and >= 0")
    return values


def positive(table: list[Mapping[str, object]], name: str) -> FloatArray:
    values = column(table, name)
    if (values <= 0).any():
        i = int(np.argmax(values <= 0))
        raise InputError(f"row {i}: column {name} holds {values[i]}: a time is above 0")
    return values
