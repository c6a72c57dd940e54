"""The oracles of the engines' rules, against choices of the engines' own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.oracles import engine_choices as engines

RECORDED = json.loads((Path(__file__).parent / "engine_choices.json").read_text())


def cases(policy: str) -> list[Any]:
    return RECORDED[policy]["cases"]


@pytest.mark.parametrize("case", cases("vllm_hash"))
def test_vllm_hash(case: dict[str, Any]) -> None:
    ids = np.array(case["ids"])
    chosen = engines.vllm_hash(ids, np.zeros(len(ids), int), case["slots"])
    assert chosen.tolist() == case["chosen"]


@pytest.mark.parametrize("case", cases("sglang_rows"))
def test_sglang_rows(case: dict[str, Any]) -> None:
    ids = np.array(case["ids"])
    chosen = engines.sglang_rows(ids, np.zeros(len(ids), int), case["slots"])
    assert chosen.tolist() == case["chosen"]


@pytest.mark.parametrize("case", cases("sglang_static"))
def test_sglang_static(case: dict[str, Any]) -> None:
    tables = engines.sglang_tables(case["slots"], case["ranks"], case["nodes"])
    assert tables.tolist() == case["chosen"]


@pytest.mark.parametrize("case", cases("ascend_fixed"))
def test_ascend_fixed(case: dict[str, Any]) -> None:
    tables = engines.ascend_tables([case["slots"]], case["ranks"], case["tensor_parallel"])
    assert tables[0].tolist() == case["chosen"]
