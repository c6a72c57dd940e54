"""`deepep` and `moe_gemm_h100`: fits judged on data they have not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from hardware_tables import (
    ExpertRows,
    deepep_low_latency,
    exchange_us,
    expert_rows_from,
    fit_expert_layers,
    hold_back_half,
    predict_expert_layers,
    read_csv,
)
from simulator_data import DATA, absent

from loadmaster.simulator.calibrate.fits import FitError, fit_exchange

# DeepEP's published low-latency run: 128 tokens a rank, top-8, hidden 7168, 8 ranks a node.
COPY_BYTES = {"dispatch": 7168 + 4 * 7168 / 128, "combine": 2 * 7168}
RANKS_PER_NODE = 8


def deepep() -> dict[str, Any]:
    """Fit alpha, its growth with nodes, and the rate on one table; predict another machine's."""
    if not DATA.is_dir():
        return absent()
    measured = read_csv(DATA / "hardware" / "h100_deepep_low_latency.csv")
    published = [
        row for row in read_csv(DATA / "hardware" / "deepep_published.csv")
        if row["kernel"] == "low_latency"
    ]
    rows, fits = [], {}
    for direction in ("dispatch", "combine"):
        table = deepep_low_latency(measured, direction, tier="nic")
        near_table = deepep_low_latency(measured, direction, tier="nvlink")
        fit, near = fit_exchange(table), fit_exchange(near_table)
        fits[direction] = {
            "alpha_us": fit.alpha_us, "alpha_per_log2_node_us": fit.alpha_per_log2_node_us,
            "gigabytes_per_s": fit.bytes_per_s / 1e9, "fit_error": vars(fit.error),
        }
        for row in published:
            if row["phase"] != direction:
                continue
            ranks = int(row["ep_size"])
            copies = int(row["tokens_per_gpu"]) * int(row["top_k"]) * COPY_BYTES[direction]
            nodes = ranks / RANKS_PER_NODE
            one_node = nodes == 1
            chosen, seen = (near, near_table) if one_node else (fit, table)
            remote = 1 - 1 / (ranks if one_node else nodes)
            predicted = float(exchange_us(chosen, nodes, copies * remote))
            within = (
                seen.nodes.min() <= nodes <= seen.nodes.max()
                and seen.port_bytes.min() <= copies * remote <= seen.port_bytes.max()
            )
            measured_us = float(row["latency_us"])
            rows.append({
                "ep": ranks, "direction": direction, "published_us": measured_us,
                "predicted_us": predicted, "error": predicted / measured_us - 1,
                "extrapolated": not within,
                "judged": not one_node,
            })
    errors = np.array([abs(r["error"]) for r in rows if r["judged"]])
    return {
        "holds": bool(errors.max() <= 0.16 and np.median(errors) <= 0.08),
        "worst": float(errors.max()), "median": float(np.median(errors)),
        "fits": fits, "rows": rows,
        "ep8": "not judged: the table's one-node rows ran over NVLink on H100, the published EP 8 "
               "run is an H800 with less NVLink and its low-latency kernel sent over RDMA",
    }


def moe_gemm_h100() -> dict[str, Any]:
    """Half of the rows of each (shape, dtype, distribution) held back, seed 0."""
    if not DATA.is_dir():
        return absent()
    rows = expert_rows_from(read_csv(DATA / "hardware" / "h100_fused_moe.csv"))
    kept, held = hold_back_half(rows.group, seed=0)
    error = _error(rows, kept, held)
    others = [vars(_error(rows, *hold_back_half(rows.group, seed=s))) for s in range(1, 6)]
    return {
        "holds": error.median <= 0.05 and error.p90 <= 0.15,
        **vars(error),
        "fitted_rows": len(kept),
        "other_seeds": others,
        "whole_groups_held_back": vars(_whole_groups(rows)),
    }


def _error(rows: ExpertRows, kept: Any, held: Any) -> FitError:
    predicted = predict_expert_layers(fit_expert_layers(rows.take(kept)), rows.take(held))
    return FitError.of(predicted, rows.us[held])


def _whole_groups(rows: ExpertRows) -> FitError:
    """Harder: one whole distribution of every (shape, dtype) unseen, in turn."""
    groups = np.array(rows.group)
    predicted, measured = [], []
    for group in np.unique(groups):
        held, kept = np.flatnonzero(groups == group), np.flatnonzero(groups != group)
        fits = fit_expert_layers(rows.take(kept))
        predicted.append(predict_expert_layers(fits, rows.take(held)))
        measured.append(rows.us[held])
    return FitError.of(np.concatenate(predicted), np.concatenate(measured))
