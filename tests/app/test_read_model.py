"""What `--model` may name, and the one answer it may need beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadmaster.app.inputs import model_notes, read_model
from loadmaster.errors import InputError, UsageError
from loadmaster.traces.model_spec import ModelSpec

CONFIG: dict[str, Any] = dict(
    model_type="mixtral", num_hidden_layers=2, num_local_experts=4, hidden_size=32,
    num_experts_per_tok=2, intermediate_size=64, torch_dtype="bfloat16",
)
PARAMS = dict(dim=32, n_layers=2, hidden_dim=64, moe=dict(num_experts=4, num_experts_per_tok=2))
SPEC = ModelSpec(num_layers=2, num_experts=4, top_k=2, hidden=32, intermediate=64)


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", CONFIG), ("params.json", PARAMS), ("my.json", CONFIG),
    ("spec.json", SPEC.model_dump(mode="json")),
    ("spec.json", dict(num_layers=2, num_experts=4, top_k=2, hidden=32, intermediate=64)),
])
def test_a_file_of_any_kind(tmp_path: Path, name: str, content: Any) -> None:
    spec = read_model(written(tmp_path / name, content))
    assert spec is not None
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (2, 4, 2)
    assert spec.bytes_per_expert_E().tolist() == [3 * 32 * 64 * 2] * 4


def test_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "config.json", CONFIG)
    spec = read_model(tmp_path)
    assert spec is not None and spec.name == tmp_path.name


@pytest.mark.parametrize("name", ["gpt-oss-20b", "openai/GPT-OSS-20B"])
def test_a_published_models_name(name: str) -> None:
    spec = read_model(Path(name))
    assert spec is not None and (spec.num_layers, spec.num_experts, spec.top_k) == (24, 32, 4)


def test_a_folder_that_is_called_like_a_model_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-oss-20b").mkdir()
    written(tmp_path / "gpt-oss-20b" / "config.json", CONFIG)
    spec = read_model(Path("gpt-oss-20b"))
    assert spec is not None and spec.num_experts == 4


@pytest.mark.parametrize(("named", "message"), [
    ("gpt-oss-21b", "close to it: gpt-oss-20b"),
    ("./no/such/folder", "no such file"), ("nowhere.json", "no such file"),
    ("../gpt-oss-20b", "no such file"),
])
def test_what_is_nowhere_says_what_could_be_named(named: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_model(Path(named))
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_which_layers_is_asked_and_answered(tmp_path: Path) -> None:
    path = written(tmp_path / "config.json", CONFIG | {"model_type": "nobody_knows"})
    with pytest.raises(InputError, match="moe_layers") as asked:
        read_model(path)
    assert "--moe-layers" in asked.value.typed and "example model" in asked.value.typed
    spec = read_model(path, "1")
    assert spec is not None and spec.layer_indices == (1,)


def test_an_answer_without_a_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"moe_layers.*model"):
        read_model(None, "3-60")
    assert read_model(None) is None and model_notes(None) == ()


def test_notes_name_the_model(tmp_path: Path) -> None:
    path = written(tmp_path / "mine_config.json", CONFIG | {"torch_dtype": None})
    assert model_notes(read_model(path)) == (
        "mine: bytes per expert: no dtype is given, 16 bits a weight are taken",
    )
