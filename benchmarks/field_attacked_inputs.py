"""Whole files of every kind that verbs read, and what may befall them on their way to us."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import save_random_checkpoint

from loadmaster.app.examples import KINDS, example
from loadmaster.foundation.arrays import IntArray
from loadmaster.placement.formats import export_plan
from loadmaster.placement.plan import Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace

LAYERS, EXPERTS, TOP_K, DEVICES = 2, 8, 2, 4
SPEC = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "hidden": 64,
        "intermediate": 32, "total_layers": LAYERS}


def make_inputs(folder: Path) -> None:
    """One good file or folder of each kind, all of one small model."""
    import torch

    trace = synth_trace(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, tokens=4000,
                        request_tokens=50)
    save_trace(trace, folder / "trace")
    np.savez(folder / "ids.npz", ids=trace.ids, num_experts=EXPERTS)
    np.save(folder / "ids.npy", trace.ids)
    counts = np.stack([np.bincount(trace.ids[:, layer].ravel(), minlength=EXPERTS)
                       for layer in range(LAYERS)])
    torch.save({"logical_count": torch.from_numpy(np.stack([counts] * 3))},
               folder / "sglang.pt")
    _dumps(folder, trace.ids, counts)
    (folder / "model.json").write_text(json.dumps(SPEC))
    slots = np.arange(EXPERTS).reshape(1, DEVICES, -1).repeat(LAYERS, axis=0)
    for name, own in (("plan", slots), ("other", slots[:, ::-1].copy())):
        Plan(slots=own, num_experts=EXPERTS).save(folder / f"{name}.json")
    plan, model = Plan.load(folder / "plan.json"), ModelSpec(**SPEC)
    for kind, ending in (("sglang", "json"), ("trtllm", "yaml"), ("vllm_ascend", "json"),
                         ("omni", "npy"), ("eplb", "npz")):
        export_plan(plan, kind, folder / f"{kind}.{ending}", model=model)
    for name, _ in KINDS.values():
        if name != "model.json":
            (folder / name).write_text(example(name.partition(".")[0]))
    grid = (folder / "grid.yaml").read_text()
    (folder / "grid.yaml").write_text(grid.replace("[4, 8]", "[4]"))
    rows = [f"{0.1 * n:.7f},{20 + n},{1 + n % 7}" for n in range(40)]
    (folder / "arrivals.csv").write_text(
        "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n"
    )
    (folder / "arrivals.jsonl").write_text("".join(
        json.dumps({"timestamp": 100 * n, "input_length": 30, "output_length": 4, "hash_ids": [n]})
        + "\n" for n in range(40)
    ))
    (folder / "words.txt").write_text("a small text of a few words " * 40, encoding="utf-8")
    (folder / "checkpoint").mkdir()
    save_random_checkpoint("qwen3_moe", folder / "checkpoint")


def _dumps(folder: Path, ids_TLK: Any, counts_LE: IntArray) -> None:
    """Routes and loads in the forms that engines and people's scripts leave."""
    (folder / "choices.csv").write_text("layer,expert\n" + "".join(
        f"{layer},{expert}\n" for row in ids_TLK[:200] for layer in range(LAYERS)
        for expert in row[layer]
    ))
    (folder / "counts.csv").write_text("layer_id,expert_id,count\n" + "".join(
        f"{layer},{expert},{counts_LE[layer, expert]}\n" for layer in range(LAYERS)
        for expert in range(EXPERTS)
    ))
    (folder / "counts.jsonl").write_text("".join(
        json.dumps({"iteration": n, "layer": layer, "tokens_per_expert": counts_LE[layer].tolist()})
        + "\n" for n in range(3) for layer in range(LAYERS)
    ))
    (folder / "history.json").write_text(json.dumps(
        {"load_history": [{"logical_expert_load": counts_LE.tolist()}] * 3}
    ))
    (folder / "logical.json").write_text(json.dumps({"logical_count": counts_LE.tolist()}))
    np.save(folder / "loads.npy", counts_LE)
    rows = []
    for n in range(20):
        whole = io.BytesIO()
        np.save(whole, ids_TLK[50 * n : 50 * n + 50].astype(np.uint8))
        text = base64.b64encode(whole.getvalue()).decode()
        rows.append(json.dumps({"id": f"cmpl-{n}", "choices": [{"index": 0, "text": "",
                                                                "routed_experts": text}]}))
    (folder / "responses.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "requests").mkdir()
    for n in range(4):
        np.save(folder / "requests" / f"req{n}.npy", ids_TLK[50 * n : 50 * n + 50].astype(np.uint8))
    (folder / "burst.csv").write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "".join(
            f"{n},GPT-4,{20 + n},{2 + n % 5},{22 + n + n % 5},API log\n" for n in range(30)
        )
    )
    (folder / "vllm.json").write_text(json.dumps(
        [list(range(EXPERTS)) for _ in range(LAYERS)]
    ))


# ---- what befalls a file -----------------------------------------------------------------------

Damage = Callable[[Path, random.Random], Path]
_ODD_NUMBERS = ("-1", "0", "1e309", "NaN", "null", '"x"', "[]", "{}", "99999999999999999999",
                "0.5", "true", "2147483648")


def damaged(path: Path, how: str, rng: random.Random) -> Path:
    """The file or folder after it, at the same place or under another name."""
    return DAMAGES[how](path, rng)


def _file_of(path: Path, rng: random.Random) -> Path:
    """The file itself, or one of a folder's."""
    if path.is_file():
        return path
    return rng.choice(sorted(p for p in path.rglob("*") if p.is_file()))


def _cut(path: Path, rng: random.Random) -> Path:
    file = _file_of(path, rng)
    whole = file.read_bytes()
    file.write_bytes(whole[: rng.randrange(max(1, len(whole)))])
    return path


def _garbled(path: Path, rng: random.Random) -> Path:
    file = _file_of(path, rng)
    whole = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 5, 50))):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    file.write_bytes(bytes(whole))
    return path


def _emptied(path: Path, rng: random.Random) -> Path:
    _file_of(path, rng).write_bytes(b"")
    return path


def _noise(path: Path, rng: random.Random) -> Path:
    _file_of(path, rng).write_bytes(rng.randbytes(rng.choice((1, 100, 5000))))
    return path


def _renamed(path: Path, rng: random.Random) -> Path:
    ending = rng.choice((".npz", ".npy", ".json", ".yaml", ".pt", ".csv", ".safetensors", ""))
    return path.rename(path.with_name(f"renamed{ending}"))


def _odd_name(path: Path, rng: random.Random) -> Path:
    name = rng.choice((b"\xff\xfe", b"new\nline", b"[red]", b" ", "ü±中".encode(), b"{0}%s",
                       b"-dash", b"\x1b[31m"))
    target = os.fsencode(path.parent) + b"/" + name + os.fsencode(path.suffix)
    os.rename(path, target)
    return Path(os.fsdecode(target))


def _a_folder(path: Path, rng: random.Random) -> Path:
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file")
    else:
        path.unlink()
        path.mkdir()
    return path


def _a_dead_link(path: Path, rng: random.Random) -> Path:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to("nowhere")
    return path


def _a_link_to_itself(path: Path, rng: random.Random) -> Path:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)
    return path


def _odd_number(path: Path, rng: random.Random) -> Path:
    """One number in a text becomes something else; a binary file is garbled instead."""
    import re

    file = _file_of(path, rng)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return _garbled(path, rng)
    found = list(re.finditer(r"-?\d+(\.\d+)?", text))
    if not found:
        return _cut(path, rng)
    one = rng.choice(found)
    file.write_text(text[: one.start()] + rng.choice(_ODD_NUMBERS) + text[one.end() :])
    return path


def _a_key_gone(path: Path, rng: random.Random) -> Path:
    """One line of a text, or one value of a JSON mapping, is not there."""
    file = _file_of(path, rng)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError):
        return _garbled(path, rng)
    if not isinstance(value, dict) or not value:
        return _emptied(path, rng)
    key = rng.choice(sorted(value))
    if rng.random() < 0.5:
        value[key] = rng.choice((None, [], {}, "x", -1, 1e300, [[[]]], True))
    else:
        del value[key]
    file.write_text(json.dumps(value))
    return path


DAMAGES: dict[str, Damage] = {
    "cut": _cut, "garbled": _garbled, "emptied": _emptied, "noise": _noise, "renamed": _renamed,
    "odd name": _odd_name, "a folder": _a_folder, "a dead link": _a_dead_link,
    "a link to itself": _a_link_to_itself, "odd number": _odd_number, "a key gone": _a_key_gone,
}
