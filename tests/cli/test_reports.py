"""`--report` and `--report-png`: every question leaves a page, and nothing is written over."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from loadmaster.traces.storage.store import save_trace
from loadmaster.traces.synth.generate import synth_trace

from .test_cli import SMALL, Run, run, trace

__all__ = ["run", "trace"]      # fixtures


def held(page: Path) -> dict:
    """The JSON that travels inside the page."""
    found = re.search(r'id="document">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_plan_and_evaluate_leave_the_answer_they_print(
    run: Run, trace: Path, tmp_path: Path
) -> None:
    plan, page, second = tmp_path / "p.json", tmp_path / "p.html", tmp_path / "e.html"
    code, out, err = run("plan", trace, "--method", "greedy", "--json", "-o", plan, "--report",
                         page, "--report-png", tmp_path / "png", *SMALL)
    assert code == 0, err
    printed = json.loads(out)
    assert held(page)["verdict"] == printed["verdict"]
    assert [r["metric"] for r in held(page)["rows"]] == [r["metric"] for r in printed["rows"]]
    assert {p.name for p in (tmp_path / "png").iterdir()} >= {"load.png", "steps.png"}
    assert "wrote the report to" in err and "load.png" in err
    code, out, err = run("evaluate", trace, plan, "--json", "--report", second,
                         "--devices-per-node", 4)
    assert code == 0, err
    assert held(second) == json.loads(out)


def test_parts_of_a_plan_get_a_page_each(run: Run, trace: Path, tmp_path: Path) -> None:
    code, _, err = run("plan", trace, "--phase", "apart", "--method", "greedy", "--report",
                       tmp_path / "p.html", "--report-png", tmp_path / "png", *SMALL)
    assert code == 0, err
    for phase in ("prefill", "decode"):
        assert f"Plan for {phase}" in (tmp_path / f"p.{phase}.html").read_text("utf-8")
        assert (tmp_path / "png" / phase / "load.png").exists()


def test_one_part_alone_has_the_page_that_was_named(
    run: Run, trace: Path, tmp_path: Path
) -> None:
    page, png = tmp_path / "p.html", tmp_path / "png"
    code, _, err = run("plan", trace, "--phase", "decode", "--report", page, "--report-png", png,
                       *SMALL)
    assert code == 0, err
    assert "Plan for decode" in page.read_text() and (png / "load.png").exists()
    assert [path.name for path in tmp_path.glob("*.html")] == ["p.html"]


def test_a_part_s_page_is_not_written_over(run: Run, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "p.decode.html").write_text("mine")
    code, out, err = run("plan", trace, "--phase", "apart", "--report", tmp_path / "p.html", *SMALL)
    assert code == 2 and out == "" and "p.decode.html exists" in err
    assert (tmp_path / "p.decode.html").read_text() == "mine"


def test_a_trace_shorter_than_the_usual_step_has_a_report(run: Run, tmp_path: Path) -> None:
    """Pictures are of the steps that were judged, whatever their size."""
    made = synth_trace(layers=2, experts=8, top_k=2, tokens=480, request_tokens=20)
    save_trace(made, tmp_path / "short")
    asked = ("--preset", "cpu", "--devices-per-node", 4, "--slots-per-device", 3, "--step-tokens",
             32, "--concurrency", 4)
    code, _, err = run("plan", tmp_path / "short", "--method", "greedy", "--effort", "fast", "-o",
                       tmp_path / "p.json", "--report", tmp_path / "p.html", *asked)
    assert code == 0, err
    code, _, err = run("evaluate", tmp_path / "short", tmp_path / "p.json", "--report",
                       tmp_path / "e.html", "--step-tokens", 32, "--concurrency", 4)
    assert code == 0, err
    assert (tmp_path / "p.html").exists() and (tmp_path / "e.html").exists()


def test_average_loads_and_a_trace_leave_pages_too(run: Run, trace: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "loads.npz", expert_load=np.random.default_rng(0).gamma(1, 10, (2, 16)))
    page, info = tmp_path / "loads.html", tmp_path / "info.html"
    code, _, err = run("plan", tmp_path / "loads.npz", "--method", "greedy", "--report", page,
                       *SMALL)
    assert code == 0, err
    assert held(page)["chosen"] == "greedy"
    code, out, err = run("trace", "info", trace, "--json", "--report", info)
    assert code == 0, err
    assert held(info) == json.loads(out)


@pytest.mark.parametrize(("option", "name", "why"), [
    ("--report", "taken", "exists: name another"), ("--report", "no/such.html", "no folder"),
    ("--report-png", "taken", "is no folder"), ("--report-png", ".", "holds files already"),
])
def test_nothing_is_written_over_and_that_is_said_first(
    run: Run, trace: Path, tmp_path: Path, option: str, name: str, why: str
) -> None:
    (tmp_path / "taken").write_text("mine")
    code, out, err = run("trace", "info", trace, option, tmp_path / name)
    assert code == 2 and out == "" and why in err
    assert (tmp_path / "taken").read_text() == "mine"
