"""`--model` and `--moe-layers` where they are typed: names, files, doubts, the one question."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.cli.main import main
from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.trace import RoutingTrace

Run = Callable[..., tuple[int, str, str]]
CONFIG: dict[str, Any] = dict(
    model_type="nobody_knows", num_hidden_layers=3, num_local_experts=16, hidden_size=64,
    num_experts_per_tok=2, intermediate_size=128,
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a verb in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loadmaster", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        text = capfd.readouterr()
        return code, text.out, text.err

    return call


def stored(path: Path, layers: int, experts: int, top_k: int) -> Path:
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(experts), (512, layers, 1)), axis=2)[:, :, :top_k]
    save_trace(RoutingTrace.from_arrays(ids, num_experts=experts,
                                        request=np.arange(512) // 16), path)
    return path


QUICK = ("--devices-per-node", 4, "--step-tokens", 64, "--concurrency", 8, "--method", "greedy",
         "--effort", "fast", "--json")


def test_a_published_models_name_makes_times(run: Run, tmp_path: Path) -> None:
    trace = stored(tmp_path / "trace", 24, 32, 4)
    code, out, err = run("plan", trace, "--model", "gpt-oss-20b", *QUICK)
    assert code == 0, err
    assert "time" in json.dumps(json.loads(out)).lower()
    code, _, err = run("plan", trace, "--model", "gpt-oss-21b", *QUICK)
    assert code == 1 and "gpt-oss-20b" in err and err.count("\n") == 1


def test_the_one_question_is_answered_by_its_option(run: Run, tmp_path: Path) -> None:
    """And what was taken without being said stands among the notes."""
    trace = stored(tmp_path / "trace", 2, 16, 2)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    code, _, err = run("plan", trace, "--model", config, *QUICK)
    assert code == 1 and "--moe-layers" in err and err.count("\n") == 1
    code, out, err = run("plan", trace, "--model", config, "--moe-layers", "1-2", *QUICK)
    assert code == 0, err
    assert any("bytes per expert: no dtype is given" in note for note in json.loads(out)["notes"])
    code, _, err = run("plan", trace, "--moe-layers", "1-2", *QUICK)
    assert code == 2 and "--model" in err


def test_help_says_what_a_model_may_be(run: Run) -> None:
    for verb in ("plan", "evaluate", "simulate", "whatif", "replay", "cache", "calibrate",
                 "plan-export", "plan-import", "plan-diff"):
        code, out, _ = run(verb, "--help")
        flat = " ".join(out.replace("│", " ").split())
        assert code == 0 and "config.json or params.json" in flat and "--moe-layers" in flat, verb
