"""Models' sizes, read right: configurations as found in the field and as packages ship them.

Right are the layers in the model's own numbers, experts, top-k, the width that travels, the
expert's width, shared experts, and bytes per expert. Files of the field say what is right
themselves; the published ones were reckoned by hand and, apart from that, tensor by tensor; of
transformers' own classes the models are built.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from oracles.built_models import FAMILIES, build
from oracles.expert_tensors import first_reckoning, published_folder, second_reckoning

from loadmaster.errors import LoadmasterError
from loadmaster.traces.model_spec import ModelSpec

FIELD = Path(__file__).resolve().parents[2] / "shared" / "data" / "field" / "configs"
RIGHT_SHARE = 0.98


def configs() -> dict[str, Any]:
    """Every file of the field right; of the published ones nearly all, the rest with a note."""
    field, published, built = _field(), _published(), _built()
    right = published["right"] + built["right"]
    of = published["of"] + built["of"]
    return {
        "holds": bool(
            field["of"] and not field["wrong"] and published["of"]
            and right >= RIGHT_SHARE * of
            and not published["without_a_note"] and not built["without_a_note"]
            and not published["reckonings_differ"]
        ),
        "right_share": round(right / of, 4) if of else None, "wanted": RIGHT_SHARE,
        "field": field, "published": published, "transformers": built,
    }


def _figures(spec: ModelSpec) -> dict[str, Any]:
    layers = spec.own_layer_indices()
    return {
        "first": layers[0], "last": layers[-1], "layers": len(layers),
        "experts": spec.num_experts, "top_k": spec.top_k, "hidden": spec.hidden,
        "intermediate": spec.intermediate, "shared": spec.num_shared_experts,
        "bytes": int(spec.bytes_per_expert_E()[0]),
    }


def _field() -> dict[str, Any]:
    if not FIELD.is_dir():
        return {"of": 0, "right": 0, "wrong": {}, "absent": str(FIELD.name)}
    expected = json.loads((FIELD / "EXPECTED.json").read_text())
    names = {"E": "experts", "K": "top_k", "H": "hidden", "I": "intermediate", "sh": "shared",
             "b": "bytes"}
    wrong: dict[str, Any] = {}
    for folder in sorted(path for path in FIELD.iterdir() if path.is_dir()):
        want = expected.get(folder.name, {})
        try:
            spec = ModelSpec.from_pretrained(folder)
        except LoadmasterError as error:
            wrong[folder.name] = str(error)
            continue
        found = _figures(spec)
        pairs = {
            **{key: (found[name], want[key]) for key, name in names.items() if key in want},
            **{key: (found[name], want["L"][key]) for key, name in
               (("moe_layers", "layers"), ("first", "first"), ("last", "last")) if "L" in want},
            "g": (spec.num_expert_groups, want.get("g", spec.num_expert_groups)),
            "gk": (spec.groups_per_token, want.get("gk", spec.groups_per_token)),
        }
        bad = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if bad:
            wrong[folder.name] = bad
    of = sum(path.is_dir() for path in FIELD.iterdir())
    return {"of": of, "right": of - len(wrong), "wrong": wrong}


def _published() -> dict[str, Any]:
    folder, expected = published_folder(), first_reckoning()
    wrong: dict[str, Any] = {}
    silent, differ = [], []
    if folder is None:
        return {"of": 0, "right": 0, "wrong": {}, "without_a_note": [], "reckonings_differ": [],
                "absent": "aiconfigurator-core is not installed"}
    there = [name for name in expected if (folder / f"{name}_config.json").is_file()]
    for name in there:
        if second_reckoning(folder, name) != expected[name]:
            differ.append(name)
        try:
            spec = ModelSpec.from_pretrained(folder / f"{name}_config.json")
        except LoadmasterError as error:
            wrong[name] = str(error)
            continue
        found = _figures(spec)
        if found != expected[name]:
            wrong[name] = {key: (found[key], expected[name][key]) for key in found
                           if found[key] != expected[name][key]}
            if not spec.notes:
                silent.append(name)
    return {"of": len(there), "right": len(there) - len(wrong), "wrong": wrong,
            "without_a_note": silent, "reckonings_differ": differ}


def _built() -> dict[str, Any]:
    wrong: dict[str, Any] = {}
    silent, of = [], 0
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as at:
            made = build(family, Path(at))
            if made is None:
                continue
            of += 1
            try:
                spec = ModelSpec.from_pretrained(at)
            except LoadmasterError as error:
                wrong[family] = str(error)
                continue
        found = (spec.own_layer_indices(), spec.num_experts, int(spec.bytes_per_expert_E()[0]))
        if found != tuple(made):
            wrong[family] = {"read": found, "built": tuple(made)}
            if not spec.notes:
                silent.append(family)
    return {"of": of, "right": of - len(wrong), "wrong": wrong, "without_a_note": silent}
