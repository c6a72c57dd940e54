"""Files as people have them, typed: read, or one line with the command that reads them."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

from loadmaster.traces.load import load_trace

from .test_cli import SMALL, Run, run
from .test_simulate import one_line

__all__ = ["run"]      # a fixture


def routing(tokens: int = 600, layers: int = 2, experts: int = 16, k: int = 2) -> np.ndarray:
    score = np.random.default_rng(0).random((tokens, layers, experts))
    return score.argsort(axis=2)[:, :, :k]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model of three hidden layers, the first of them dense; dumps of it."""
    (tmp_path / "model.json").write_text(json.dumps({
        "name": "toy", "num_layers": 2, "num_experts": 16, "top_k": 2, "hidden": 256,
        "intermediate": 128, "layer_indices": [1, 2], "total_layers": 3,
    }))
    hidden = np.concatenate([np.zeros((600, 1, 2), int), routing()], axis=1)
    np.savez(tmp_path / "hidden.npz", routed_experts=hidden, request=np.arange(600) // 20)
    np.savez(tmp_path / "loads.npz", expert_load=np.arange(1, 33).reshape(16, 2))
    file = io.BytesIO()
    np.save(file, hidden[:50].astype(np.uint8))
    answer = {"choices": [{"routed_experts": base64.b64encode(file.getvalue()).decode()}]}
    (tmp_path / "answers.jsonl").write_text((json.dumps(answer) + "\n") * 12)
    twice = routing()
    twice[5, 1, 1] = twice[5, 1, 0]
    np.savez(tmp_path / "twice.npz", ids=twice, num_experts=16)
    return tmp_path


@pytest.mark.parametrize("file", ["hidden.npz", "answers.jsonl"])
def test_a_dump_is_imported_by_its_model(run: Run, place: Path, file: str) -> None:
    """The dense row is left out, the layers have the model's numbers, and both are said."""
    code, out, err = run("trace", "import", place / file, "--model", place / "model.json", "--out",
                         place / "t")
    assert code == 0 and "layers 0 are dense in toy: left out" in " ".join(out.split()), err
    trace = load_trace(place / "t")
    assert trace.layer_indices == (1, 2) and trace.num_tokens == 600
    if file == "answers.jsonl":
        assert np.array_equal(trace.ids[:50], routing()[:50])


@pytest.mark.parametrize(("verb", "file", "words"), [
    (("trace", "import"), "twice.npz", ("token 5, layer 1: expert", "twice in one choice")),
    (("trace", "import"), "hidden.npz", ("give --num-experts",)),
    (("trace", "import"), "loads.npz", ("--axes EL",)),
    (("plan",), "loads.npz", ("--axes EL if the last are layers",)),
    (("trace", "import"), "model.json", ("neither counts per expert",)),
    (("trace", "import"), "absent.jsonl", ("no such file",)),
])
def test_a_refusal_is_one_line_and_leaves_nothing(
    run: Run, place: Path, verb: tuple[str, ...], file: str, words: tuple[str, ...]
) -> None:
    before = sorted(place.iterdir())
    code, _, err = run(*verb, place / file, "--out", place / "new")
    assert code in (1, 2) and all(word in one_line(err) for word in words)
    assert sorted(place.iterdir()) == before


def test_the_command_that_a_refusal_names_works(run: Run, place: Path) -> None:
    """From `trace import` to `plan`, with the axes that were given."""
    _, _, err = run("trace", "import", place / "loads.npz", "--axes", "EL", "--out", place / "t")
    said = one_line(err)
    command = said[said.index("`loadmaster ") + len("`loadmaster ") :].split("`")[0].split()
    assert command[:2] == ["plan", str(place / "loads.npz")]
    command[command.index("plan.json")] = str(place / "plan.json")
    code, _, err = run(*command, "--method", "greedy", "--effort", "fast")
    assert code == 0, err
    plan = json.loads((place / "plan.json").read_text())
    assert len(plan["slots"]) == 2 and plan["num_experts"] == 16


def test_a_trace_of_some_layers_goes_all_the_way(run: Run, place: Path) -> None:
    """One of the model's two layers: planned, priced with the other, exported whole."""
    np.savez(place / "one.npz", ids=routing(tokens=6_000, layers=1), num_experts=16,
             request=np.arange(6_000) // 50)
    model = ("--model", place / "model.json")
    code, _, err = run("plan", place / "one.npz", *model, *SMALL, "--out", place / "p.json")
    assert code != 0 and "--layers 1" in one_line(err)
    code, out, err = run("plan", place / "one.npz", *model, "--layers", 2, *SMALL, "--method",
                         "greedy", "--out", place / "p.json")
    said = " ".join(out.split())
    assert code == 0 and "lacks 1 of the model's 2 MoE layers (1)" in said, err
    code, out, err = run("plan-export", place / "p.json", "--format", "sglang", *model, "--out",
                         place / "s.json")
    assert code == 0 and "holds 1 of the model's 2 MoE layers" in " ".join(out.split()), err
    table = json.loads((place / "s.json").read_text())["physical_to_logical_map"]
    default = [slot % 16 for slot in range(len(table[0]))]
    assert len(table) == 3 and table[:2] == [default] * 2 and table[2] != default
    code, _, err = run("trace", "import", place / "one.npz", "--layers", 2, "--out", place / "t")
    assert code == 0, err
    code, out, err = run("evaluate", place / "t", place / "p.json", *model, "--preset", "cpu",
                         "--step-tokens", 128, "--concurrency", 16)
    assert code == 0 and "that the plan does not hold" in " ".join(out.split()), err
    code, _, err = run("simulate", place / "t", place / "p.json", *model, "--preset", "cpu")
    assert code != 0 and "loadmaster evaluate --model" in one_line(err)


def test_repeated_routes_are_dropped_when_asked(run: Run, place: Path) -> None:
    ids = routing()
    ids[:300] = ids[0]
    np.savez(place / "warm.npz", ids=ids, num_experts=16)
    code, out, _ = run("trace", "import", place / "warm.npz", "--out", place / "t", "--json")
    assert code == 0 and any("--drop-repeated" in note for note in json.loads(out)["notes"])
    code, out, _ = run("trace", "import", place / "warm.npz", "--out", place / "u",
                       "--drop-repeated", "--json")
    assert code == 0 and json.loads(out)["tokens"] == 300


def test_arrivals_say_their_unit_and_rate(run: Run, place: Path) -> None:
    """In the notes of `simulate`; the option decides."""
    run("trace", "import", place / "hidden.npz", "--model", place / "model.json", "--out",
        place / "t")
    run("plan", place / "t", "--method", "contiguous", *SMALL, "--out", place / "p.json")
    rows = [{"timestamp": 2 * i, "input_length": 9, "output_length": 3} for i in range(6)]
    (place / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("simulate", place / "t", place / "p.json", "--model", place / "model.json",
              "--preset", "cpu", "--arrivals", place / "a.jsonl", "--json")
    code, out, err = run(*common)
    assert code == 0, err
    assert any("in milliseconds" in n and "500 requests/s" in n for n in json.loads(out)["notes"])
    code, out, err = run(*common, "--arrivals-unit", "s")
    assert code == 0, err
    assert any("in seconds" in n and "0.5 requests/s" in n for n in json.loads(out)["notes"])
    code, _, err = run("simulate", place / "t", place / "p.json", "--model", place / "model.json",
                       "--arrivals-unit", "s")
    assert code == 2 and "name one with --arrivals" in one_line(err)
