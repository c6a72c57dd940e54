"""Every kind of file that a person may edit is read strictly: the same faults, the file named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadmaster.app.inputs import read_model
from loadmaster.errors import InputError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.formats import import_plan
from loadmaster.placement.plan import Plan
from loadmaster.simulator.events.fault_file import read_faults
from loadmaster.simulator.whatif.grid import Grid
from loadmaster.simulator.whatif.resume import finished_cells
from loadmaster.traces.arrival_files import load_arrivals
from loadmaster.traces.formats.asked import Asked
from loadmaster.traces.formats.engines.trtllm import import_statistics
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.storage.manifest import Manifest, read_manifest
from loadmaster.workers.coordinator.journal import Journal
from loadmaster.workers.rank.weight_files import TensorFiles

CLUSTER = Cluster.preset("h100", devices_per_node=2, slots_per_device=2)
MODEL = ModelSpec(num_layers=1, num_experts=2, top_k=1)
PLAN = Plan(slots=[[[0], [1]]], num_experts=2)      # type: ignore[arg-type]
MANIFEST = Manifest(num_layers=1, num_experts=2, top_k=1, layer_indices=(0,), columns=())


@dataclass(frozen=True)
class Kind:
    """A file's name, whole content, a key of it, and who reads it; `lines`: one value a line."""

    name: str
    content: Any
    key: str
    read: Callable[[Path], Any]
    lines: bool = False

    @property
    def yaml(self) -> bool:
        return self.name.endswith(".yaml")

    def write(self, folder: Path, text: str | bytes | None = None) -> Path:
        """The file, as it should be or with another text. A line of it is the only one."""
        path = folder / self.name
        if text is None:
            text = yaml.safe_dump(self.content) if self.yaml else json.dumps(self.content)
        path.write_bytes((text if isinstance(text, bytes) else text.encode()) + b"\n" * self.lines)
        return path


KINDS = {
    "cluster": Kind(
        "cluster.yaml", {"hardware": "h100", "devices": [{"node": 0, "slots": 2}]}, "devices",
        Cluster.from_yaml,
    ),
    "grid": Kind("grid.yaml", {"axes": {"nodes": [1]}, "seed": 1}, "seed", Grid.from_yaml),
    "faults": Kind(
        "faults.yaml", {"faults": [{"kind": "jitter", "sigma": 0.1}]}, "faults",
        lambda path: read_faults(path, CLUSTER),
    ),
    "model": Kind("model.json", MODEL.model_dump(mode="json"), "top_k", read_model),
    "plan": Kind("plan.json", json.loads(PLAN.to_json()), "slots", Plan.load),
    "sglang plan": Kind(
        "sglang.json", {"physical_to_logical_map": [[0, 1]]}, "physical_to_logical_map",
        lambda path: import_plan(path, "sglang", num_devices=2),
    ),
    "vllm-ascend plan": Kind(
        "ascend.json",
        {"moe_layer_count": 1, "layer_list": [{
            "layer_id": 0, "device_count": 2, "device_list": [
                {"device_id": 0, "device_expert": [0]}, {"device_id": 1, "device_expert": [1]}],
        }]},
        "moe_layer_count", lambda path: import_plan(path, "vllm_ascend"),
    ),
    "TensorRT-LLM plan": Kind(
        "trtllm.yaml",
        {"initial_global_assignments": {3: [0, 1]}, "layer_updates_per_iter": 0, "num_slots": 2},
        "num_slots", lambda path: import_plan(path, "trtllm", num_devices=2),
    ),
    "manifest": Kind(
        "manifest.json", MANIFEST.model_dump(mode="json"), "columns",
        lambda path: read_manifest(path.parent),
    ),
    "checkpoint": Kind(
        "config.json",
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1,
         "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8},
        "hidden_size", lambda path: ModelSpec.from_pretrained(path.parent),
    ),
    "weights' index": Kind(
        "model.safetensors.index.json", {"weight_map": {}, "metadata": {}}, "weight_map",
        lambda path: TensorFiles(path.parent),
    ),
    "journal": Kind(
        "journal.jsonl", {"phase": "life", "epoch": 0}, "epoch",
        lambda path: Journal(path.parent).begin_life(), lines=True,
    ),
    "finished cells": Kind(
        "cells.jsonl", {"study": "s", "fields": {}, "figures": {}}, "study",
        lambda path: finished_cells(path, "s"), lines=True,
    ),
    "arrivals": Kind(
        "mooncake.jsonl", {"timestamp": 1, "input_length": 1, "output_length": 1}, "timestamp",
        load_arrivals, lines=True,
    ),
}
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def refused(kind: Kind, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        kind.read(path)
    said = str(caught.value)
    assert str(path) in said and "\n" not in said and len(said) < 800
    return said


@EVERY
def test_what_is_whole_is_read(kind: Kind, tmp_path: Path) -> None:
    kind.read(kind.write(tmp_path))


@EVERY
def test_a_key_given_twice_is_refused(kind: Kind, tmp_path: Path) -> None:
    """Even with the same value: which of two was meant is nobody's guess."""
    once = json.dumps(kind.content[kind.key])
    if kind.yaml:
        text = yaml.safe_dump(kind.content) + f"{kind.key}: {once}\n"
    else:
        text = f'{{"{kind.key}": {once}, {json.dumps(kind.content)[1:]}'
    said = refused(kind, kind.write(tmp_path, text))
    assert kind.name == "cells.jsonl" or f"'{kind.key}' is given twice" in said


@EVERY
@pytest.mark.parametrize("content", [
    b"\xff\xfe{\x00}\x00", b"[]", b"[" * 100_000, b'{"a":' * 70 + b"1" + b"}" * 70, b"{",
    b'{"a": ' + b"9" * 5000 + b"}", b"7", b'"text"', b"null",
], ids=["not UTF-8", "a list", "too deep", "deep", "cut", "endless number", "7", "text", "null"])
def test_what_is_something_else_is_one_line(kind: Kind, content: bytes, tmp_path: Path) -> None:
    refused(kind, kind.write(tmp_path, content))


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if not k.lines],
                         ids=[n for n, k in KINDS.items() if not k.lines])
def test_an_empty_file_is_one_line(kind: Kind, tmp_path: Path) -> None:
    refused(kind, kind.write(tmp_path, b""))


@EVERY
def test_a_byte_order_mark_is_nothing_to_yaml_and_named_in_json(
    kind: Kind, tmp_path: Path
) -> None:
    path = kind.write(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    if kind.yaml:
        kind.read(path)
    else:
        said = refused(kind, path)
        assert kind.name == "cells.jsonl" or "byte order mark" in said


@pytest.mark.parametrize("name", ["model", "plan", "sglang plan", "manifest", "journal"])
@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_json_numbers_are_numbers(name: str, constant: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    whole = json.dumps(kind.content)
    value = json.dumps(kind.content[kind.key])
    text = whole.replace(f'"{kind.key}": {value}', f'"{kind.key}": {constant}')
    assert text != whole
    assert f"{constant} is no number" in refused(kind, kind.write(tmp_path, text))


def test_a_checkpoint_may_say_that_a_limit_is_infinite(tmp_path: Path) -> None:
    """As Mamba hybrids do of their time step."""
    kind = KINDS["checkpoint"]
    text = json.dumps(kind.content | {"time_step_limit": [0.0, float("inf")]})
    assert "Infinity" in text
    kind.read(kind.write(tmp_path, text))


def test_statistics_say_their_counts_once(tmp_path: Path) -> None:
    (tmp_path / "meta_info.json").write_text('{"num_experts": 2, "num_experts": 4}')
    with pytest.raises(InputError, match="'num_experts' is given twice"):
        import_statistics(tmp_path, Asked())
