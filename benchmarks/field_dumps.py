"""Dumps as found in the field: each read as what it is, or refused with what would work.

What is right is reckoned here from each file by numpy, json and torch alone.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from field_command import FIELD, Ran, refused, run, says, section

import loadmaster as lm

DUMPS = FIELD / "dumps"
TINY, V4 = FIELD / "plans" / "tiny_v3_with_mtp", FIELD / "configs" / "deepseek_v4_expert_fp4"
SAMPLE = ("--method", "greedy", "--effort", "fast")

Array = npt.NDArray[Any]
Case = Callable[[Path], tuple[Ran, bool]]


def dumps() -> dict[str, Any]:
    """Every file of the folder."""
    return section(DUMPS, _cases() if DUMPS.is_dir() else {})


def _trace(
    file: str, ids: Array, layers: tuple[int, ...], *words: str, options: tuple[object, ...] = (),
    k: Array | None = None, request: list[int] | None = None,
) -> Case:
    """`trace import` gives these ids, layers and requests, and says these words."""

    def case(place: Path) -> tuple[Ran, bool]:
        ran = run("trace", "import", DUMPS / file, "--out", place / "t", *options)
        if not says(ran, *words):
            return ran, False
        got = lm.load_trace(place / "t")
        same = got.layer_indices == layers and got.num_tokens == len(ids)
        if k is None:
            same &= bool(np.array_equal(got.ids, ids)) and got.k_of_token is None
        else:
            load = [[int(((ids[:, r] == e)).sum()) for e in range(got.num_experts)]
                    for r in range(ids.shape[1])]
            same &= bool(np.array_equal(got.k_of_token, k)) and got.load_LE().tolist() == load
        if request is not None:
            same &= got.request is not None and got.request.tolist() == request
        return ran, same

    return case


def _loads(
    file: str, load_LE: Array, layers: tuple[int, ...], *words: str,
    options: tuple[object, ...] = (),
) -> Case:
    """`trace info` sees these layers with this skew, and `plan` plans them."""

    def case(place: Path) -> tuple[Ran, bool]:
        info = run("trace", "info", DUMPS / file, "--json", *options)
        if info.code:
            return info, False
        facts = json.loads(info.out)
        skew = load_LE.max(axis=1) / load_LE.mean(axis=1)
        same = facts["layer_indices"] == list(layers) and np.allclose(facts["skew_L"], skew)
        ran = run("plan", DUMPS / file, *SAMPLE, "--out", place / "p.json", *options)
        same &= says(ran, *words) and np.array(
            json.loads((place / "p.json").read_text())["slots"]
        ).shape[0] == len(layers)
        return ran, bool(same)

    return case


def _refusal(file: str, command: tuple[object, ...], *words: str) -> Case:
    def case(place: Path) -> tuple[Ran, bool]:
        ran = run(*(DUMPS / file if part == "FILE" else place / "t" if part == "OUT" else part
                    for part in command))
        return ran, refused(ran, *words) and not any(place.iterdir())

    return case


IMPORT = ("trace", "import", "FILE", "--out", "OUT")
PLAN = ("plan", "FILE", *SAMPLE, "--out", "OUT")


def _cases() -> dict[str, Case]:
    return {**_routes(), **_counts(), **_recordings(), **_tables()}


def _routes() -> dict[str, Case]:
    dense = _npz("routed_experts_dense_rows_zero.npz", "routed_experts")
    tiny = _npz("routed_experts_tiny_v3_dense_row.npz", "routed_experts")
    only = _npz("routed_experts_tiny_v3_moe_rows_only.npz", "routed_experts")
    padded = _npz("routed_experts_minus_one.npz", "routed_experts")
    kept = padded[(padded >= 0).any(axis=(1, 2))]
    zero = _npz("zero_experts.npz", "topk_ids")
    dummy = _npz("dummy_rows.npz", "routed_experts")
    flat = dummy.reshape(len(dummy), -1)
    _, which, times = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    common = which.reshape(-1) == times.argmax()
    each = [np.load(p) for p in sorted((DUMPS / "per_request_npy").glob("*.npy"))]
    answers = [
        np.load(io.BytesIO(base64.b64decode(json.loads(line)["choices"][0]["routed_experts"])))
        for line in (DUMPS / "vllm_completions_routed_experts.jsonl").read_text().splitlines()
    ]
    sixteen = ("--num-experts", 16)
    return {
        "routed_experts_dense_rows_zero.npz": _trace(
            "routed_experts_dense_rows_zero.npz", dense[:, 2:], (2, 3, 4), "layers 0-1 hold zeros"),
        "routed_experts_tiny_v3_dense_row.npz": _trace(
            "routed_experts_tiny_v3_dense_row.npz", only, (1, 2, 3), "taken as dense"),
        "routed_experts_tiny_v3_dense_row.npz --model": _trace(
            "routed_experts_tiny_v3_dense_row.npz", tiny[:, 1:], (1, 2, 3), "are dense in tiny_v3",
            options=("--model", TINY)),
        "routed_experts_tiny_v3_moe_rows_only.npz": _trace(
            "routed_experts_tiny_v3_moe_rows_only.npz", only, (1, 2, 3), options=("--model", TINY)),
        "routed_experts_minus_one.npz": _trace(
            "routed_experts_minus_one.npz", kept, (0, 1, 2), "padding, left out",
            k=(kept >= 0).sum(axis=2)),
        "zero_experts.npz": _trace(
            "zero_experts.npz", np.where(zero < 16, zero.astype(int), -1), (0, 1, 2),
            f"{(zero >= 16).mean():.1%} of the choices", "counted apart",
            k=(zero < 16).sum(axis=2)),
        "dup_in_token.npz": _refusal(
            "dup_in_token.npz", IMPORT, "token 5, layer 1: expert 3 twice"),
        "dummy_rows.npz": _trace(
            "dummy_rows.npz", dummy, (0, 1), f"one route in {common.mean():.1%}",
            "--drop-repeated"),
        "dummy_rows.npz --drop-repeated": _trace(
            "dummy_rows.npz", dummy[~common], (0, 1), "left out", options=("--drop-repeated",)),
        "per_request_npy": _trace(
            "per_request_npy", np.concatenate(each), (0, 1, 2), "4 requests", options=sixteen,
            request=[i for i, ids in enumerate(each) for _ in ids]),
        "per_request_npy without E": _refusal("per_request_npy", IMPORT, "--num-experts"),
        "vllm_completions_routed_experts.jsonl": _trace(
            "vllm_completions_routed_experts.jsonl", np.concatenate(answers), (0, 1, 2),
            "3 requests", options=sixteen,
            request=[i for i, ids in enumerate(answers) for _ in ids]),
    }


def _counts() -> dict[str, Case]:
    two, three = np.load(DUMPS / "loads_LE.npy"), np.load(DUMPS / "loads_WLE.npy")
    turned = _npz("loads_EL.npz", "expert_load")
    dense = _npz("loads_with_dense_row.npz", "logical_count")
    window = _npz("zero_window.npz", "expert_load")
    bad = np.argwhere(np.isnan(_npz("nan_load.npz", "expert_load")))[0]
    history = json.loads((DUMPS / "load_history.json").read_text())["load_history"]
    past = np.array([w["logical_expert_load"] for w in history]).sum(axis=0)
    count = np.array(
        json.loads((DUMPS / "sglang_logical_count.json").read_text())["logical_count"]
    )
    return {
        "loads_1e9_assignments_per_layer.npz": _scaled("loads_1e9_assignments_per_layer.npz"),
        "loads_1e12_assignments_per_layer.npz": _scaled("loads_1e12_assignments_per_layer.npz"),
        "loads_LE.npy": _loads("loads_LE.npy", two, (0, 1, 2, 3), "taken as [layers, experts]"),
        "loads_WLE.npy": _loads("loads_WLE.npy", three.sum(axis=0), (0, 1, 2, 3),
                                options=("--axes", "WLE")),
        "loads_WLE.npy without axes": _refusal("loads_WLE.npy", PLAN, "--axes WLE"),
        "loads_EL.npz": _loads("loads_EL.npz", turned.T, (0, 1, 2, 3), options=("--axes", "EL")),
        "loads_EL.npz without axes": _refusal("loads_EL.npz", PLAN, "--axes EL"),
        "loads_with_dense_row.npz": _loads(
            "loads_with_dense_row.npz", dense[1:], (1, 2, 3, 4), "taken as dense"),
        "zero_window.npz": _loads(
            "zero_window.npz", window.sum(axis=0), (0, 1, 2), "1 of 6 windows are empty"),
        "nan_load.npz": _refusal(
            "nan_load.npz", PLAN, f"window {bad[0]}, layer {bad[1]}, expert {bad[2]}"),
        "load_history.json": _loads("load_history.json", past, (0, 1)),
        "load_history.json as a trace": _refusal(
            "load_history.json", IMPORT, "loadmaster plan"),
        "sglang_logical_count.json": _loads("sglang_logical_count.json", count, (0, 1, 2, 3)),
    }


def _recordings() -> dict[str, Case]:
    stat = {name: _torch(name)["logical_count"].numpy().sum(axis=0) for name in (
        "sglang_stat_tiny_v3.pt", "sglang_stat_tiny_v3_with_mtp_row.pt",
        "sglang_stat_one_rank_only.pt", "sglang_stat_v4.pt")}
    tensor = _torch("expert_load_tensor.pt").numpy()
    return {
        "sglang_stat_tiny_v3.pt": _loads(
            "sglang_stat_tiny_v3.pt", stat["sglang_stat_tiny_v3.pt"][1:], (1, 2, 3),
            "taken as dense"),
        "sglang_stat_tiny_v3_with_mtp_row.pt": _loads(
            "sglang_stat_tiny_v3_with_mtp_row.pt",
            stat["sglang_stat_tiny_v3_with_mtp_row.pt"][1:], (1, 2, 3, 4)),
        "sglang_stat_tiny_v3_with_mtp_row.pt --model": _draft_row,
        "sglang_stat_one_rank_only.pt": _loads(
            "sglang_stat_one_rank_only.pt", stat["sglang_stat_one_rank_only.pt"], (0, 1, 2, 3),
            "look like one rank's counts"),
        "sglang_stat_v4.pt": _some_layers,
        "expert_load_tensor.pt": _loads(
            "expert_load_tensor.pt", tensor, (0, 1, 2, 3), "taken as [layers, experts]"),
    }


def _tables() -> dict[str, Case]:
    rows = list(csv.DictReader((DUMPS / "moe_trace.csv").open(newline="")))
    ids = np.array([int(row["expert"]) for row in rows]).reshape(-1, 2, 4)
    assert [int(row["layer"]) for row in rows] == [0] * 4 + [1] * 4 + [
        layer for _ in ids[1:] for layer in (0,) * 4 + (1,) * 4
    ]
    summed = np.zeros((1, 16))
    for rank in (0, 1):
        for row in csv.DictReader((DUMPS / f"expert_distribution_rank{rank}.csv").open(newline="")):
            summed[0, int(row["expert_id"])] += int(row["count"])
    passes = [json.loads(line) for line in
              (DUMPS / "tokens_per_expert_rank0.jsonl").read_text().splitlines()]
    counted = np.array([row["tokens_per_expert"] for row in passes]).sum(axis=0)[None]
    return {
        "moe_trace.csv": _trace("moe_trace.csv", ids, (0, 1), "each 4 rows of one layer",
                                options=("--num-experts", 16)),
        "moe_trace.csv without E": _refusal("moe_trace.csv", IMPORT, "--num-experts"),
        "expert_distribution_rank0.csv": _loads(
            "expert_distribution_rank0.csv", summed, (3,), "counts of 2 ranks summed"),
        "expert_distribution_rank1.csv": _loads(
            "expert_distribution_rank1.csv", summed, (3,), "counts of 2 ranks summed"),
        "tokens_per_expert_rank0.jsonl": _loads(
            "tokens_per_expert_rank0.jsonl", counted, (3,), "rank 0's counts alone"),
    }


# ---- cases of their own -----------------------------------------------------------------------


def _scaled(file: str) -> Case:
    """The same placement as the same loads at a hundred assignments per expert, as fast."""

    def case(place: Path) -> tuple[Ran, bool]:
        loads = _npz(file, "expert_load").astype(np.float64)
        np.savez(place / "small.npz", expert_load=loads / loads.sum(axis=1).max() * 1e5)
        small = run("plan", place / "small.npz", "--method", "auto", "--out", place / "s.json",
                    "--json")
        large = run("plan", DUMPS / file, "--method", "auto", "--out", place / "l.json", "--json")
        if small.code or large.code:
            return large, False
        seconds = [json.loads(r.out)["rows"][0]["seconds"] for r in (small, large)]
        slots = [json.loads((place / f"{n}.json").read_text())["slots"] for n in "sl"]
        return large, slots[0] == slots[1] and seconds[1] < 2 * seconds[0] + 2

    return case


def _draft_row(place: Path) -> tuple[Ran, bool]:
    """A row behind the hidden layers is the draft layer, one of its own."""
    ran = run("plan", DUMPS / "sglang_stat_tiny_v3_with_mtp_row.pt", "--model", TINY, *SAMPLE,
              "--out", place / "p.json")
    made = json.loads((place / "p.json").read_text())
    told = says(ran, "layer 4 is a draft (MTP) layer")
    return ran, told and made["layer_indices"] == [1, 2, 3, 4]


def _some_layers(place: Path) -> tuple[Ran, bool]:
    """40 of 43 layers: planned, the others default, all exported, and said."""
    plan = run("plan", DUMPS / "sglang_stat_v4.pt", "--model", V4, *SAMPLE, "--devices-per-node",
               8, "--out", place / "p.json")
    if not says(plan, "lacks 3 of the model's 43 MoE layers (0-2)"):
        return plan, False
    made = json.loads((place / "p.json").read_text())
    ran = run("plan-export", place / "p.json", "--format", "sglang", "--model", V4, "--out",
              place / "s.json")
    table = json.loads((place / "s.json").read_text())["physical_to_logical_map"]
    slots = len(table[0])
    right = made["layer_indices"] == list(range(3, 43)) and len(table) == 43
    right &= all(row == [s % 256 for s in range(slots)] for row in table[:3])
    right &= [[e for device in layer for e in device] for layer in made["slots"]] == table[3:]
    return ran, right and says(ran, "holds 40 of the model's 43 MoE layers")


def _npz(file: str, name: str) -> Array:
    return np.asarray(np.load(DUMPS / file)[name])


def _torch(file: str) -> Any:
    import torch

    return torch.load(DUMPS / file, weights_only=True)
