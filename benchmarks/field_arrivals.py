"""Arrivals as found in the field: rates in the file's own unit, said; lengths alone as such.

Expected times and lengths are reckoned from each file here, by csv, json and datetime alone; then
the file is simulated on a small model, through the command line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from field_command import FIELD, Ran, refused, run, section

from loadmaster.traces.arrival_files import load_arrivals

ARRIVALS = FIELD / "arrivals"
MODEL = dict(num_layers=2, num_experts=8, top_k=2, hidden=64, intermediate=32)

Case = Callable[[Path], tuple[Ran, bool]]
Request = tuple[float, int, int]            # seconds, prompt, output


def arrivals() -> dict[str, Any]:
    """Every file of the folder."""
    return section(ARRIVALS, _cases() if ARRIVALS.is_dir() else {})


def _cases() -> dict[str, Case]:
    azure = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    burst = ("Timestamp", "Request tokens", "Response tokens")
    lines = ("timestamp", "input_length", "output_length")
    return {
        "azure_2024.csv": _file("azure_2024.csv", azure, _date, "dates", "sorted by time"),
        "azure_2024_sorted.csv": _file("azure_2024_sorted.csv", azure, _date, "dates"),
        "azure_mm_2025.csv": _file("azure_mm_2025.csv", azure, _date, "dates"),
        "azure_zero_output.csv": _file(
            "azure_zero_output.csv", azure, _date, "2 of 2 requests read or write no token"),
        "burstgpt.csv": _file("burstgpt.csv", burst, float, "in seconds", "served as one token"),
        "bailian_whole_seconds.jsonl": _file(
            "bailian_whole_seconds.jsonl", lines, float, "Bailian's timestamp in seconds"),
        "mooncake_float.jsonl": _file(
            "mooncake_float.jsonl", lines, _milliseconds,
            "Mooncake's timestamp in milliseconds", "--arrivals-unit"),
        "mooncake_float.jsonl --arrivals-unit s": _file(
            "mooncake_float.jsonl", lines, float, "in seconds", options=("--arrivals-unit", "s"),
            unit="s"),
        "sharegpt.json": _lengths,
        "sharegpt.json replayed": _needs_times,
    }


def _file(
    file: str, columns: tuple[str, str, str], seconds: Callable[[str], float], *words: str,
    options: tuple[object, ...] = (), unit: str | None = None,
) -> Case:
    """Times, lengths and the rate said are the file's own, and the simulator serves them."""

    def case(place: Path) -> tuple[Ran, bool]:
        expected = sorted(
            ((seconds(row[columns[0]]), int(row[columns[1]]), int(row[columns[2]]))
             for row in _rows(ARRIVALS / file)), key=lambda row: row[0]
        )
        first = expected[0][0]
        rate = (len(expected) - 1) / (expected[-1][0] - first)
        ran = _simulate(place, ARRIVALS / file, *options)
        read = load_arrivals(ARRIVALS / file, unit=unit)
        same = np.allclose(read.time_us, [(row[0] - first) * 1e6 for row in expected], atol=1)
        same &= read.prompt_tokens.tolist() == [row[1] for row in expected]
        same &= read.output_tokens.tolist() == [row[2] for row in expected]
        told = f"{rate:.4g} requests/s"
        return ran, bool(same) and ran.code == 0 and all(w in ran.said for w in (told, *words))

    return case


def _lengths(place: Path) -> tuple[Ran, bool]:
    """No times: drawn at the rate asked for, said; lengths estimated from the texts, said."""
    talk = json.loads((ARRIVALS / "sharegpt.json").read_text())[0]["conversations"]
    expected = [-(-len(turn["value"].encode()) // 4) for turn in talk[:2]]
    read = load_arrivals(ARRIVALS / "sharegpt.json", rate_per_s=2.0)
    same = [read.prompt_tokens[0], read.output_tokens[0]] == expected
    ran = _simulate(place, ARRIVALS / "sharegpt.json", "--rate", 2)
    words = ("lengths alone", "a Poisson process of 2 requests/s", "estimated from the texts")
    return ran, same and ran.code == 0 and all(word in ran.said for word in words)


def _needs_times(place: Path) -> tuple[Ran, bool]:
    plan = _place(place)
    ran = run("replay", place / "t", plan, "--model", place / "m.json", "--arrivals",
              ARRIVALS / "sharegpt.json")
    return ran, refused(ran, "lengths alone", "--rate")


def _simulate(place: Path, file: Path, *options: object) -> Ran:
    plan = _place(place)
    return run("simulate", place / "t", plan, "--model", place / "m.json", "--arrivals", file,
               "--step-tokens", 512, *options)


def _place(place: Path) -> Path:
    """A trace, a model and a plan in the folder; the plan."""
    run("trace", "synth", "--out", place / "t", "--layers", 2, "--experts", 8, "--top-k", 2,
        "--tokens", 8_000)
    (place / "m.json").write_text(json.dumps(MODEL))
    run("plan", place / "t", "--method", "contiguous", "--devices-per-node", 2,
        "--step-tokens", 128, "--concurrency", 8, "--out", place / "p.json")
    return place / "p.json"


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        return list(csv.DictReader(path.open(newline="")))
    return [json.loads(line) for line in path.read_text().splitlines()]


def _date(text: str) -> float:
    """Seconds since 1970; seven decimals are one more than datetime reads."""
    plain = text.removesuffix("+00:00")
    whole, _, fraction = plain.partition(".")
    return (datetime.fromisoformat(whole) - datetime(1970, 1, 1)).total_seconds() + float(
        f"0.{fraction or 0}"
    )


def _milliseconds(value: Any) -> float:
    return float(value) / 1000
