"""Plan files as found in the field: read as the engine reads them, or refused with what would work.

Expected slots are taken from each file here, by json and yaml alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from field_command import FIELD, Ran, refused, run, says, section

PLANS = FIELD / "plans"
TINY = PLANS / "tiny_v3_with_mtp"

Case = Callable[[Path], tuple[Ran, bool]]


def plans() -> dict[str, Any]:
    """Every file of the folder."""
    return section(PLANS, _cases() if PLANS.is_dir() else {})


def _cases() -> dict[str, Case]:
    ascend = _ascend("ascend_plain.json")
    rows = _read("sglang_moe_rows_only.json")["physical_to_logical_map"]
    bare = _read("vllm_bare_list.json")
    return {
        "ascend_plain.json": _imported("ascend_plain.json", "vllm_ascend", ascend, (0,)),
        "ascend_layer_id_from_1.json": _imported(
            "ascend_layer_id_from_1.json", "vllm_ascend", _ascend("ascend_layer_id_from_1.json"),
            (0,), "layer_id counts from 1", "by position"),
        "ascend_layer_id_model_numbers.json": _imported(
            "ascend_layer_id_model_numbers.json", "vllm_ascend",
            _ascend("ascend_layer_id_model_numbers.json"), (3,), "the model's own numbers, 3"),
        "ascend_no_device_count_versioned.json": _imported(
            "ascend_no_device_count_versioned.json", "vllm_ascend",
            _ascend("ascend_no_device_count_versioned.json"), (0,), "'strategy_version'"),
        "ascend_shared_expert_devices.json": _imported(
            "ascend_shared_expert_devices.json", "vllm_ascend",
            [layer[1:] for layer in _ascend("ascend_shared_expert_devices.json")], (0,),
            "device 0 holds expert 0 alone"),
        "trtllm_two_keys.yaml": _imported(
            "trtllm_two_keys.yaml", "trtllm", _trtllm("trtllm_two_keys.yaml"), (1, 2, 3),
            options=("--devices", 2, "--model", TINY)),
        "trtllm_mtp_layer.yaml": _imported(
            "trtllm_mtp_layer.yaml", "trtllm", _trtllm("trtllm_mtp_layer.yaml"), (1, 2, 3, 4),
            "layer 4 is a draft (MTP) layer", options=("--devices", 2, "--model", TINY)),
        "trtllm_mtp_layer.yaml back": _back,
        "trtllm_online_only.yaml": _refusal(
            "trtllm_online_only.yaml", "trtllm", "no plan to import", "loadmaster plan"),
        "sglang_moe_rows_only.json": _imported(
            "sglang_moe_rows_only.json", "sglang", _halves(rows), (0, 1, 2), "--model tells",
            options=("--devices", 2)),
        "sglang_moe_rows_only.json --model": _imported(
            "sglang_moe_rows_only.json", "sglang", _halves(rows), (1, 2, 3),
            "taken by position", "plan-export", options=("--devices", 2, "--model", TINY)),
        "vllm_bare_list.json": _imported(
            "vllm_bare_list.json", "vllm", _halves(bare), (1, 2, 3),
            options=("--devices", 2, "--model", TINY)),
        "vllm_bare_list.json as SGLang's": _refusal(
            "vllm_bare_list.json", "sglang", "--format vllm reads it"),
        "cluster_8_plus_4.yaml": _cluster,
        "tiny_v3_with_mtp": _checkpoint,
    }


def _imported(
    file: str, format: str, expected: list[list[list[int]]], layers: tuple[int, ...], *words: str,
    options: tuple[object, ...] = (),
) -> Case:
    def case(place: Path) -> tuple[Ran, bool]:
        ran = run("plan-import", PLANS / file, "--format", format, "--out", place / "p.json",
                  *options)
        if not says(ran, *words):
            return ran, False
        made = json.loads((place / "p.json").read_text())
        return ran, made["slots"] == expected and made["layer_indices"] in (
            list(layers), [] if layers == tuple(range(len(layers))) else None
        )

    return case


def _refusal(file: str, format: str, *words: str) -> Case:
    def case(place: Path) -> tuple[Ran, bool]:
        ran = run("plan-import", PLANS / file, "--format", format, "--devices", 2, "--out",
                  place / "p.json")
        return ran, refused(ran, *words) and not any(place.iterdir())

    return case


def _back(place: Path) -> tuple[Ran, bool]:
    """The draft layer goes out again where it stood."""
    file = PLANS / "trtllm_mtp_layer.yaml"
    run("plan-import", file, "--format", "trtllm", "--devices", 2, "--model", TINY, "--out",
        place / "p.json")
    ran = run("plan-export", place / "p.json", "--format", "trtllm", "--model", TINY, "--out",
              place / "o.yaml")
    return ran, yaml.safe_load((place / "o.yaml").read_text()) == yaml.safe_load(file.read_text())


def _cluster(place: Path) -> tuple[Ran, bool]:
    """Twelve devices on two nodes, 24 slots each, which 256 experts do not divide over."""
    rng = np.random.default_rng(0)
    np.savez(place / "l.npz", logical_count=rng.integers(100, 999, (2, 256)))
    ran = run("plan", place / "l.npz", "--cluster", PLANS / "cluster_8_plus_4.yaml", "--method",
              "contiguous", "--method", "greedy", "--effort", "fast", "--out", place / "p.json")
    if ran.code:
        return ran, False
    slots = np.array(json.loads((place / "p.json").read_text())["slots"])
    held = all(set(range(256)) <= set(layer.reshape(-1).tolist()) for layer in slots)
    return ran, slots.shape[:2] == (2, 12) and slots.shape[2] <= 24 and held


def _checkpoint(place: Path) -> tuple[Ran, bool]:
    """Exported for the model whole: dense layer 0 and what the plan lacks as SGLang starts."""
    slots = [[[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]]]
    (place / "map.json").write_text(json.dumps([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 3))
    run("plan-import", place / "map.json", "--format", "vllm", "--devices", 2, "--model", TINY,
        "--out", place / "p.json")
    ran = run("plan-export", place / "p.json", "--format", "sglang", "--model", TINY, "--out",
              place / "o.json")
    table = json.loads((place / "o.json").read_text())["physical_to_logical_map"]
    return ran, _halves(table) == slots * 4


def _read(file: str) -> Any:
    return json.loads((PLANS / file).read_text())


def _ascend(file: str) -> list[list[list[int]]]:
    return [[device["device_expert"] for device in layer["device_list"]]
            for layer in _read(file)["layer_list"]]


def _trtllm(file: str) -> list[list[list[int]]]:
    table = yaml.safe_load((PLANS / file).read_text())["initial_global_assignments"]
    return _halves([table[layer] for layer in sorted(table)])


def _halves(rows: list[list[int]]) -> list[list[list[int]]]:
    """Two devices, the first with the first half of the slots."""
    return [[row[: len(row) // 2], row[len(row) // 2 :]] for row in rows]
