"""Plans small enough to read, and their files as the engines write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from loadmaster.placement.formats import export_plan
from loadmaster.placement.plan import Plan
from loadmaster.traces.model_spec import ModelSpec

PLANS = Path(__file__).resolve().parents[4] / "shared" / "data" / "plans"
needs_plans = pytest.mark.skipif(not PLANS.is_dir(), reason=f"plan files not present: {PLANS}")

FILES = [("sglang", ".json"), ("sglang", ".pt"), ("trtllm", ".yaml"), ("vllm", ".json"),
         ("vllm_ascend", ".json"), ("eplb", ".npz"), ("eplb", ".pt"), ("omni", ".npy")]

# Layer 0 is dense; 6 experts on 2 ranks of 4 slots.
MODEL = ModelSpec(
    name="toy", num_layers=2, num_experts=6, top_k=2, layer_indices=(1, 2), total_layers=3
)
SLOTS = np.array([[[3, 5, 4, 0], [2, 5, 4, 1]], [[0, 1, 2, 3], [4, 5, 0, 3]]])
TOY = Plan(slots=SLOTS.astype(np.int16), num_experts=6, layer_indices=(1, 2))
UNEVEN = Plan(slots=np.array([[[0, 1, -1], [2, 3, 0]]], np.int16), num_experts=4)
TWICE = Plan(slots=np.array([[[0, 0], [1, 2]]], np.int16), num_experts=3)


def held(plan: Plan) -> list[list[set[int]]]:
    """Experts of each layer and device, in no order."""
    return [[{int(e) for e in row if e >= 0} for row in layer] for layer in plan.slots]


def toy_document(format: str, folder: Path) -> Any:
    """The toy plan as the engine's JSON or YAML holds it."""
    path = folder / f"toy{dict(FILES[::-1])[format]}"
    export_plan(TOY, format, path, model=MODEL)
    return yaml.safe_load(path.read_text())


def write(format: str, document: Any, folder: Path) -> Path:
    path = folder / f"file{dict(FILES[::-1])[format]}"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path
