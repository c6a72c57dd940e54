"""Published and recorded tables of H100 timings, and the fits that are judged on them.

Knows the tables' columns and units (microseconds, bytes). The files stay where the user has them;
nothing of them is shipped.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadmaster.errors import InputError
from loadmaster.foundation.arrays import FloatArray, IntArray
from loadmaster.simulator.calibrate.fits import (
    ExchangeFit,
    ExchangeRows,
    FitError,
    column,
    positive,
    relative_nnls,
)
from loadmaster.simulator.random_streams import stream

TILE_TOKENS = 64.0    # grouped kernels round each expert's tokens up to a tile


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """A CSV file's rows by column name. Raises InputError when it is absent or empty."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such table") from error
    except (UnicodeDecodeError, IsADirectoryError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV table: {error}") from error
    if not rows:
        raise InputError(f"{path}: the table has no rows")
    return rows


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """Timed expert layers of one device, [M] each.

    tokens: entering the layer. assignments: (token, expert) pairs computed. active: experts with at
    least one. expert_bytes: weights of one expert. flops_per_assignment: 6·H·I. label: what was
    timed ("deepseek-v3/fp8_block"); rows of one label share kernels, so they share one fit.
    """

    tokens: FloatArray
    assignments: FloatArray
    active: FloatArray
    expert_bytes: FloatArray
    flops_per_assignment: FloatArray
    us: FloatArray
    label: tuple[str, ...] = ()
    group: tuple[str, ...] = ()     # finer than label: what a hold-out draws by

    def __len__(self) -> int:
        return len(self.us)

    def take(self, rows: npt.NDArray[np.int64]) -> ExpertRows:
        """These rows only."""
        return ExpertRows(
            self.tokens[rows], self.assignments[rows], self.active[rows], self.expert_bytes[rows],
            self.flops_per_assignment[rows], self.us[rows],
            tuple(self.label[i] for i in rows), tuple(self.group[i] for i in rows),
        )


def expert_rows_from(rows: Iterable[Mapping[str, object]]) -> ExpertRows:
    """The rows of a fused-MoE table.

    Needs tokens, assignments (or pairs), active_experts (or active_experts_est), hidden,
    intermediate, expert_weight_bytes and latency_us; `shape`, `weight_dtype`, `distribution` name
    labels and groups where present. Raises InputError naming the column and row.
    """
    table = list(rows)
    label = tuple(f"{r.get('shape', '')}/{r.get('weight_dtype', '')}" for r in table)
    group = tuple(
        f"{name}/{r.get('distribution', '')}" for name, r in zip(label, table, strict=True)
    )
    hidden, intermediate = column(table, "hidden"), column(table, "intermediate")
    return ExpertRows(
        tokens=column(table, "tokens"),
        assignments=column(table, "assignments", "pairs"),
        active=column(table, "active_experts", "active_experts_est"),
        expert_bytes=column(table, "expert_weight_bytes"),
        flops_per_assignment=6.0 * hidden * intermediate,
        us=positive(table, "latency_us"),
        label=label,
        group=group,
    )


def deepep_low_latency(
    rows: Iterable[Mapping[str, object]], direction: str, *, tier: str
) -> ExchangeRows:
    """DeepEP low-latency rows as exchange rows. direction: "dispatch" or "combine".

    tier "nic": several nodes, a copy leaves the node with probability 1 - 1/N under the uniform
    routing of these tables. tier "nvlink": one node, 1 - 1/G leaves the device.
    """
    if direction not in ("dispatch", "combine") or tier not in ("nic", "nvlink"):
        raise InputError(f"direction {direction!r} or tier {tier!r} is not one a table holds")
    table = list(rows)
    nodes, devices = column(table, "nodes"), column(table, "ep_size")
    chosen = nodes > 1 if tier == "nic" else nodes == 1
    parts = nodes if tier == "nic" else devices
    sent = column(table, f"{direction}_bytes_per_gpu") * (1.0 - 1.0 / parts)
    us = positive(table, f"{direction}_us")
    return ExchangeRows(nodes[chosen], sent[chosen], us[chosen])


def nccl_all_to_all(
    rows: Iterable[Mapping[str, object]], devices: int
) -> ExchangeRows:
    """NCCL all-to-all rows of one node with `devices` GPUs; a GPU's own share does not leave it."""
    table = list(rows)
    gpus = column(table, "gpus")
    chosen = gpus == devices
    if not chosen.any():
        raise InputError(f"no rows for {devices} GPUs; there are {sorted(set(gpus.tolist()))}")
    sent = column(table, "send_bytes_per_gpu") * (1.0 - 1.0 / devices)
    us = positive(table, "latency_us")
    return ExchangeRows(np.ones(int(chosen.sum())), sent[chosen], us[chosen])


def exchange_us(fit: ExchangeFit, nodes: npt.ArrayLike, port_bytes: npt.ArrayLike) -> FloatArray:
    """Microseconds of an exchange of `nodes` with `port_bytes` on its most loaded port."""
    log_nodes = np.log2(np.asarray(nodes, np.float64))
    transfer_us = np.asarray(port_bytes, np.float64) / fit.bytes_per_s * 1e6
    us: FloatArray = fit.alpha_us + fit.alpha_per_log2_node_us * log_nodes + transfer_us
    return us


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


def _expert_terms(rows: ExpertRows) -> FloatArray:
    """[M, 4] start, weight bytes of active experts, flops lost to half-full tiles, flops."""
    flops = rows.flops_per_assignment
    return np.stack(
        [np.ones(len(rows)), rows.active * rows.expert_bytes,
         rows.active * TILE_TOKENS / 2 * flops, rows.assignments * flops],
        axis=1,
    )
