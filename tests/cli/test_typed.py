"""What a function calls a parameter, whoever typed a verb reads as the option; advice likewise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer

from loadmaster.app.inputs import read_trace
from loadmaster.cli.main import app
from loadmaster.cli.typed import as_typed
from loadmaster.errors import InputError, LoadmasterError, UsageError, naming
from loadmaster.traces.formats import import_any

from .test_cli import Run, run, trace

__all__ = ["run", "trace"]      # fixtures

VERBS = typer.main.get_command(app)


@pytest.mark.parametrize(("typed", "text", "said"), [
    ("trace synth", "switch_tokens -5 must be at least 1", "--switch-tokens -5 must be at least 1"),
    ("trace synth", "tokens 0 and domains 1", "--tokens 0 and --domains 1"),
    ("plan", "a step's tokens 0 and concurrency 4", "a step's --step-tokens 0 and --concurrency 4"),
    ("plan", "unknown order 'x'", "unknown --order 'x'"),
    ("plan", "time_limit_s nan must be above 0", "--time-limit nan must be above 0"),
    ("plan", "in order; the method has no order", "in order; the method has no order"),
    ("plan-show", "switch_tokens -5", "switch_tokens -5"),
    ("plan", "--devices-per-node 3 and x_devices_per_node", "--devices-per-node 3 and "
     "x_devices_per_node"),
    ("", "seed -1", "seed -1"), ("no-such-verb", "seed -1", "seed -1"),
])
def test_parameters_are_options_of_the_verb_typed(typed: str, text: str, said: str) -> None:
    assert as_typed(text, VERBS, typed.split()) == said


@pytest.mark.parametrize(("asked", "option"), [
    (("--concurrency", -1), "--concurrency -1"), (("--nodes", 0), "--nodes 0"),
    (("--seed", -4), "--seed -4"), (("--order", "x"), "--order 'x'"),
    (("--traffic", "x"), "--traffic 'x'"), (("--preset", "x"), "--preset 'x'"),
    (("--objective", "x"), "--objective 'x'"), (("--method", "x"), "--method 'x'"),
    (("--dispatch", "x"), "--dispatch 'x'"), (("--effort", "x"), "--effort 'x'"),
    (("--oversubscription", 0.2), "--oversubscription 0.2"), (("--phase", "x"), "--phase 'x'"),
    (("--time-limit", 0), "--time-limit 0"), (("--horizon", "nan"), "--horizon nan"),
    (("--objective", "time"), "give --model"),
])
def test_plan_names_the_option_that_cannot_be(
    run: Run, trace: Path, asked: tuple[object, ...], option: str
) -> None:
    code, _, err = run("plan", trace, *asked)
    assert code == 2 and option in err.splitlines()[-1], err


def test_a_files_field_keeps_its_own_name(run: Run, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("hardware: h100\nnodes: 2\n")
    code, _, err = run("plan", trace, "--cluster", tmp_path / "c.yaml")
    assert code == 1 and "c.yaml: slots_per_device: is missing" in err


def test_the_same_refusal_helps_a_caller_and_whoever_typed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((600, 2, 2), np.int64))
    with pytest.raises(InputError, match=r"give num_experts;"):
        import_any(tmp_path / "ids.npy")
    code, _, err = run("plan", tmp_path / "ids.npy")
    assert code == 1 and "give --num-experts;" in err
    np.savez(tmp_path / "loads.npz", load=np.ones((2, 4)))
    with pytest.raises(InputError, match="for load only"):
        read_trace(tmp_path / "loads.npz")
    code, _, err = run("evaluate", tmp_path / "loads.npz", tmp_path / "none.json")
    assert code == 1
    code, _, err = run("trace", "import", tmp_path / "loads.npz", "-o", tmp_path / "new")
    command = err.split("`")[1].split()
    assert code == 1 and command[:3] == ["loadmaster", "plan", str(tmp_path / "loads.npz")]
    monkeypatch.chdir(tmp_path)
    assert run(*command[1:], "--devices-per-node", 2)[0] == 0, "the advice works"


def test_advice_travels_with_its_error() -> None:
    error = UsageError("two of them", call="leave b out", command="leave --b out")
    assert (str(error), error.typed, error.what) == (
        "two of them: leave b out", "two of them: leave --b out", "two of them"
    )
    with pytest.raises(InputError) as caught, naming("a.json"):
        raise InputError("no c", call="give c", command="give --c")
    assert str(caught.value) == "a.json: no c: give c" and caught.value.typed.endswith("--c")
    assert str(LoadmasterError("plain")) == LoadmasterError("plain").typed == "plain"
    typed = LoadmasterError("x", command="y")
    assert typed.typed == str(typed) == "x: y"


@pytest.mark.parametrize(("typed", "called"), [
    ("give --num-experts", "give num_experts"), ("--axes WLE for loads", "axes='WLE' for loads"),
    ("name it (--model)", "name it (model)"), ("check --devices", "check num_devices"),
    ("--key ids=NAME names it", "keys ids=NAME names it"),
    ("`loadmaster plan a --out b` makes one, or --layers", "`loadmaster plan a --out b` makes one, "
     "or layers"),
    ("/tmp/--odd/x--y: an em -- dash", "/tmp/--odd/x--y: an em -- dash"),
])
def test_what_is_written_as_options_a_caller_reads_as_parameters(typed: str, called: str) -> None:
    error = InputError(typed)
    assert (error.typed, str(error)) == (typed, called)
