"""Measured tables: published CSV files and rows taken on this machine, as plain arrays.

Knows columns and units (microseconds, bytes). Knows nothing of models fitted to them. The files
stay where the user has them; nothing of them is shipped.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import InputError

FloatArray = npt.NDArray[np.float64]


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


@dataclass(frozen=True, eq=False)
class ExchangeRows:
    """Timed all-to-alls, [M] each: nodes, bytes on the most loaded port, microseconds.

    tier: "nvlink" where everything stays in a node, "nic" where the network port is the busiest.
    """

    nodes: FloatArray
    port_bytes: FloatArray
    us: FloatArray
    tier: str

    def __len__(self) -> int:
        return len(self.us)


def expert_rows_from(rows: Iterable[Mapping[str, object]]) -> ExpertRows:
    """Rows as `kernels/time_experts.py` prints them or a fused-MoE CSV holds them.

    Needs tokens, assignments (or pairs), active_experts (or active_experts_est), hidden,
    intermediate, expert_weight_bytes and latency_us; `shape`, `weight_dtype`, `distribution` name
    labels and groups where present. Raises InputError naming the column and row.
    """
    table = list(rows)
    label = tuple(f"{r.get('shape', '')}/{r.get('weight_dtype', '')}" for r in table)
    group = tuple(
        f"{name}/{r.get('distribution', '')}" for name, r in zip(label, table, strict=True)
    )
    hidden, intermediate = _column(table, "hidden"), _column(table, "intermediate")
    return ExpertRows(
        tokens=_column(table, "tokens"),
        assignments=_column(table, "assignments", "pairs"),
        active=_column(table, "active_experts", "active_experts_est"),
        expert_bytes=_column(table, "expert_weight_bytes"),
        flops_per_assignment=6.0 * hidden * intermediate,
        us=_positive(table, "latency_us"),
        label=label,
        group=group,
    )


def exchange_rows_from(rows: Iterable[Mapping[str, object]], *, tier: str = "nic") -> ExchangeRows:
    """Rows of timed exchanges: nodes, port_bytes, latency_us."""
    table = list(rows)
    return ExchangeRows(
        _column(table, "nodes"), _column(table, "port_bytes"), _positive(table, "latency_us"), tier
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
    nodes, devices = _column(table, "nodes"), _column(table, "ep_size")
    chosen = nodes > 1 if tier == "nic" else nodes == 1
    parts = nodes if tier == "nic" else devices
    sent = _column(table, f"{direction}_bytes_per_gpu") * (1.0 - 1.0 / parts)
    us = _positive(table, f"{direction}_us")
    return ExchangeRows(nodes[chosen], sent[chosen], us[chosen], tier)


def nccl_all_to_all(
    rows: Iterable[Mapping[str, object]], devices: int
) -> ExchangeRows:
    """NCCL all-to-all rows of one node with `devices` GPUs; a GPU's own share does not leave it."""
    table = list(rows)
    gpus = _column(table, "gpus")
    chosen = gpus == devices
    if not chosen.any():
        raise InputError(f"no rows for {devices} GPUs; there are {sorted(set(gpus.tolist()))}")
    sent = _column(table, "send_bytes_per_gpu") * (1.0 - 1.0 / devices)
    us = _positive(table, "latency_us")
    return ExchangeRows(np.ones(int(chosen.sum())), sent[chosen], us[chosen], "nvlink")


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


def _column(table: list[Mapping[str, object]], *names: str) -> FloatArray:
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


def _positive(table: list[Mapping[str, object]], name: str) -> FloatArray:
    values = _column(table, name)
    if (values <= 0).any():
        i = int(np.argmax(values <= 0))
        raise InputError(f"row {i}: column {name} holds {values[i]}: a time is above 0")
    return values
