"""What-if: a grid of scenarios, ranked; one bad cell stops none of the others."""

from __future__ import annotations

import csv
import io
import json

import pytest

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.planning.planner import plan as make_plan
from loadmaster.simulator.whatif.grid import Grid, grid_schema
from loadmaster.simulator.whatif.run import FIGURES, Cell, Study, WhatIf, run_whatif

from ..conftest import steady_workload

BASE = {"devices_per_node": 4, "slots_per_device": 2, "step_tokens": 128, "max_requests": 32,
        "method": "contiguous"}


def study(trace, model, **grid) -> Study:
    return Study(Grid.parse({"base": BASE} | grid), trace, model, steady_workload(20))


class Backwards:
    """An executor that computes the last item first, yet keeps the order."""

    def map(self, function, items):
        answers = [function(item) for item in reversed(list(items))]
        return reversed(answers)


def test_cells_come_in_the_order_of_the_axes_last_axis_fastest() -> None:
    grid = Grid.parse({"base": {"nodes": 9}, "axes": {"nodes": [1, 2], "load": [1, 3]}})
    assert [(c["nodes"], c["load"]) for c in grid.cells()] == [(1, 1), (1, 3), (2, 1), (2, 3)]


def test_a_bad_cell_says_why_and_the_others_finish(trace, model) -> None:
    """One slot on each of four devices cannot hold eight experts."""
    result = run_whatif(study(trace, model, axes={"slots_per_device": [2, 1, 3]}))
    assert [c.error is None for c in result.cells] == [True, False, True]
    assert "slots" in result.failed[0].error
    assert len(result.ranked()) == 2


@pytest.mark.parametrize(
    ("axis", "value", "names"),
    [("nodes", 0, "nodes"), ("load", -1.0, "load"), ("method", "magic", "magic"),
     ("preset", "abacus", "abacus"), ("failure", "flood", "flood"), ("dispatch", "dice", "dice")],
)
def test_each_bad_value_is_named_in_its_cell(trace, model, axis, value, names) -> None:
    result = run_whatif(study(trace, model, axes={axis: [value]}))
    assert names in result.cells[0].error


def test_a_time_limit_begins_no_further_cell(trace, model, tmp_path) -> None:
    """What was not begun says so, and a second run with the same file goes on."""
    grid, file = study(trace, model, axes={"slots_per_device": [2, 3]}), tmp_path / "cells"
    cut = run_whatif(grid, resume=file, time_limit_s=1e-9)
    assert all(c.error is not None and "not begun: the time limit" in c.error for c in cut.cells)
    whole = run_whatif(grid, resume=file, time_limit_s=3600.0)
    assert not whole.failed and whole.to_dict() == run_whatif(grid).to_dict()
    with pytest.raises(UsageError, match="time_limit_s 0 must be above 0"):
        run_whatif(grid, time_limit_s=0)


def test_memory_kept_free_is_a_field_like_any_other(trace, model) -> None:
    """Too little for one slot of each expert is said in its cell."""
    result = run_whatif(study(trace, model, axes={"reserved_bytes": [None, 85_899_345_919]}))
    assert result.cells[0].error is None
    assert "no number of such devices holds it" in result.cells[1].error


def test_more_load_and_slower_links_rank_lower(trace, model) -> None:
    result = run_whatif(study(trace, model, base=BASE | {"nodes": 2, "devices_per_node": 2},
                              axes={"nic": [0.01, 1.0]}))
    assert [c.fields["nic"] for c in result.ranked("step_mean_us")] == [1.0, 0.01]


def test_an_oversubscribed_spine_costs_time(trace, model) -> None:
    result = run_whatif(study(trace, model, base=BASE | {"nodes": 2, "devices_per_node": 2},
                              axes={"oversubscription": [None, 4.0, 0.5]}))
    free, narrow, impossible = result.cells
    assert narrow.figures["step_mean_us"] > free.figures["step_mean_us"]
    assert "oversubscription" in impossible.error


def test_any_executor_gives_the_same_bytes(trace, model) -> None:
    told = []
    grid = study(trace, model, axes={"slots_per_device": [2, 3], "dispatch": ["even", "balanced"]})
    plain = run_whatif(grid, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    other = run_whatif(grid, executor=Backwards())
    assert json.dumps(plain.to_dict()) == json.dumps(other.to_dict())
    assert plain.to_csv() == other.to_csv()


def test_an_interrupted_study_resumes_where_it_stopped(trace, model, tmp_path) -> None:
    path = tmp_path / "cells.jsonl"
    grid = study(trace, model, axes={"slots_per_device": [2, 1, 3]})

    class Stops:
        def map(self, function, items):
            yield function(next(iter(items)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_whatif(grid, executor=Stops(), resume=path)
    path.write_text(path.read_text() + '{"study": "cut sho')
    ran = []

    class Counts:
        def map(self, function, items):
            ran.extend(items)
            return map(function, ran)

    resumed = run_whatif(grid, executor=Counts(), resume=path)
    assert [c["slots_per_device"] for c in ran] == [1, 3]
    whole = run_whatif(grid)
    assert resumed.to_dict() == whole.to_dict()
    other = study(trace, model, axes={"slots_per_device": [2, 1, 3]}, seed=5)
    assert other.digest() != grid.digest()
    ran.clear()
    run_whatif(other, executor=Counts(), resume=path)
    assert len(ran) == 3, "cells of another study do not count"


def test_failures_of_the_grid_happen(trace, model) -> None:
    failures = {"slow": [{"kind": "slow_device", "device": 0, "factor": 20.0}]}
    result = run_whatif(study(trace, model, failures=failures,
                              axes={"failure": ["none", "slow"]}))
    well, slow = (c.figures["step_mean_us"] for c in result.cells)
    assert slow > well


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ({"kind": "slow_device", "device": 0, "factor": "x"}, "slow_device.factor"),
        ({"kind": "slow_device", "device": 0, "factor": 2.0, "at_us": "now"}, "slow_device.at_us"),
        ({"kind": "lost_devices", "at_us": 1.0, "devices": 3}, "lost_devices.devices"),
        ({"kind": "jitter", "sigma": 0.1, "colour": 1}, "jitter.colour: no such field"),
        ({"kind": ["jitter"]}, "kind"),
        ({"kind": "jitter"}, "jitter.sigma"),
    ],
)
def test_a_bad_fault_is_named_in_its_cell_only(trace, model, fault, names) -> None:
    result = run_whatif(study(trace, model, failures={"bad": [fault]},
                              axes={"failure": ["bad", "none"]}))
    assert names in result.cells[0].error and "failures.bad" in result.cells[0].error
    assert result.cells[1].error is None


def test_a_cell_that_breaks_says_so_and_stops_no_other(trace, model, monkeypatch) -> None:
    def breaks(*args, method, **kwargs):
        if method == "eplb":
            raise ZeroDivisionError("by nought")
        return make_plan(*args, method=method, **kwargs)

    monkeypatch.setattr("loadmaster.simulator.whatif.run.make_plan", breaks)
    result = run_whatif(study(trace, model, axes={"method": ["eplb", "contiguous"]}))
    assert [c.error for c in result.cells] == ["ZeroDivisionError: by nought", None]
    assert set(FIGURES) == set(result.cells[1].figures)


def test_an_unknown_figure_is_refused_before_anything_runs(trace, model) -> None:
    def never(_done, _all) -> None:
        raise AssertionError("a cell ran")

    with pytest.raises(InputError, match="no figure 'beauty'"):
        run_whatif(study(trace, model, axes={"load": [1.0]}), rank_by="beauty", progress=never)


def test_cells_are_planned_for_time(trace, model, monkeypatch) -> None:
    seen = []

    def watches(*args, **kwargs):
        seen.append(kwargs["model"])
        return make_plan(*args, **kwargs)

    monkeypatch.setattr("loadmaster.simulator.whatif.run.make_plan", watches)
    run_whatif(study(trace, model, axes={"load": [1.0]}))
    assert seen == [model]


def test_the_front_keeps_what_nothing_beats() -> None:
    def cell(time, devices, memory):
        return Cell({"name": time}, {"latency_mean_us": time, "devices": devices,
                                     "expert_bytes_per_device": memory})

    result = WhatIf((cell(3.0, 8, 10), cell(2.0, 8, 10), cell(1.0, 16, 10), cell(5.0, 8, 5),
                     cell(6.0, 16, 10)))
    assert [c.figures["latency_mean_us"] for c in result.pareto()] == [1.0, 2.0, 5.0]


def test_the_table_is_a_csv_with_a_row_per_cell(trace, model) -> None:
    result = run_whatif(study(trace, model, axes={"slots_per_device": [2, 1]}))
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [r["slots_per_device"] for r in rows] == ["2", "1"]
    assert float(rows[0]["latency_mean_us"]) > 0 and rows[1]["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {colour: [1]}", r"axes\.colour: no such field"),
        ("base: {colour: 1}", r"base\.colour: no such field"),
        ("axes: {nodes: []}", r"axes\.nodes: lists no value"),
        ("axes: 3", "axes"),
        ("- a list", "a grid file is a mapping"),
        ("a: [", "not YAML"),
        ("slo: {ttft_us: -1, tpot_us: 2}", r"slo\.ttft_us"),
    ],
)
def test_a_grid_that_cannot_be_names_the_field(tmp_path, text, message) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Grid.from_yaml(path)
    with pytest.raises(InputError, match="no such grid file"):
        Grid.from_yaml(tmp_path / "absent.yaml")


def test_the_schema_names_every_field_of_a_scenario() -> None:
    properties = grid_schema()["$defs"]["Scenario"]["properties"]
    assert {"nodes", "slots_per_device", "failure", "overlap"} <= set(properties)
