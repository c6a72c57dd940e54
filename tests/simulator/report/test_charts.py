"""Charts: what is drawn is what the arrays hold, in scales that can be compared."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from loadmaster.simulator.report.charts.answered_within import answered_within
from loadmaster.simulator.report.charts.cache_stalls import cache_stalls
from loadmaster.simulator.report.charts.load_map import load_map
from loadmaster.simulator.report.charts.over_time import MOST_POINTS, Mark, over_time
from loadmaster.simulator.report.charts.pareto import Choice, pareto
from loadmaster.simulator.report.charts.replica_gain import Offer, replica_gain
from loadmaster.simulator.report.charts.spread import PerStep, spread
from loadmaster.simulator.report.charts.switch_moves import switch_moves
from loadmaster.simulator.report.charts.theme import colours, inline
from loadmaster.simulator.report.charts.time_parts import time_parts
from loadmaster.simulator.report.charts.traffic_map import traffic_map


def rows_of(spec: dict, layer: int | None = None) -> list[dict[str, str]]:
    """The rows a chart carries."""
    part = spec if layer is None or "data" not in spec["layer"][layer] else spec["layer"][layer]
    data = part.get("data") or spec["data"]
    text = data.get("values") or spec["datasets"][data["name"]]
    return list(csv.DictReader(io.StringIO(text)))


def test_columns_travel_as_csv_with_their_kinds() -> None:
    data = inline({"name": ["a, \"b\"", "c"], "x": [1.0, math.nan], "n": [3, 4]}).to_dict()
    assert list(csv.DictReader(io.StringIO(data["values"]))) == [
        {"name": 'a, "b"', "x": "1", "n": "3"}, {"name": "c", "x": "", "n": "4"},
    ]
    assert data["format"]["parse"] == {"name": "string", "x": "number", "n": "number"}
    with pytest.raises(ValueError, match="different lengths"):
        inline({"a": [1], "b": [1, 2]})


def test_every_name_has_a_colour_even_the_ninth() -> None:
    assert len(colours([str(i) for i in range(9)]).to_dict()["range"]) == 9


def test_a_load_map_has_a_cell_a_layer_and_device_on_the_scale_given() -> None:
    load_LG = np.array([[1.5, 0.5], [1.0, 1.0], [0.25, 1.75]])
    spec = load_map(load_LG, "auto", 2.0).to_dict()
    drawn = {(int(r["layer"]), int(r["device"])): float(r["load"]) for r in rows_of(spec)}
    assert drawn == {(i, j): load_LG[i, j] for i in range(3) for j in range(2)}
    assert spec["encoding"]["color"]["scale"]["domain"] == [0.0, 2.0]
    assert spec["encoding"]["color"]["scale"]["domainMid"] == 1


def test_a_traffic_map_leaves_out_what_stays_and_draws_node_borders() -> None:
    traffic_GG = np.arange(16.0).reshape(4, 4)
    spec = traffic_map(traffic_GG, np.array([0, 0, 1, 1]), "now", 15.0).to_dict()
    drawn = {(int(r["source"]), int(r["target"])): float(r["transfers"])
             for r in rows_of(spec, 0)}
    assert drawn == {(i, j): traffic_GG[i, j] for i in range(4) for j in range(4) if i != j}
    assert [r["border"] for r in rows_of(spec, 1)] == ["2"] and len(spec["layer"]) == 3
    assert len(traffic_map(traffic_GG, np.zeros(4, int), "now", 1.0).to_dict()["layer"]) == 1


def test_a_spread_shows_quantiles_the_mean_and_no_band_where_none_is_known() -> None:
    value_W = np.append(np.linspace(1, 2, 101), math.nan)       # a step without tokens
    spec = spread({"a": PerStep(value_W, 1.4, 1.6), "b": PerStep(value_W, -math.inf, math.inf)},
                  "imbalance").to_dict()
    first, second = rows_of(spec)
    assert [float(first[q]) for q in ("p1", "p25", "mean", "p75", "p99")] == pytest.approx(
        [1.01, 1.25, 1.5, 1.75, 1.99])
    assert (first["low"], first["high"]) == ("1.4", "1.6")
    assert (second["low"], second["high"]) == ("", "")


def test_the_parts_of_a_step_add_up_to_it() -> None:
    spec = time_parts({"a": {"compute": 3e3, "placement": 1e3, "jitter": 0.0}}).to_dict()
    rows = rows_of(spec)
    assert sum(float(r["ms"]) for r in rows) == pytest.approx(4.0)
    assert [r["cause"] for r in rows] == ["compute", "placement"]


def test_long_lines_are_averaged_in_stretches_and_marks_keep_their_time() -> None:
    at, value = np.arange(10_000.0), np.arange(10_000.0)
    spec = over_time({"a": (at, value)}, [Mark(5_000, "switch", "3 moves")], x="step",
                     y="ms").to_dict()
    rows = rows_of(spec, 0)
    assert len(rows) == MOST_POINTS
    assert np.mean([float(r["value"]) for r in rows]) == pytest.approx(4999.5, rel=1e-3)
    assert rows_of(spec, 1) == [{"at": "5000", "kind": "switch", "detail": "3 moves"}]


def test_offers_choices_stalls_moves_and_waits_carry_their_figures() -> None:
    offer = rows_of(replica_gain([Offer("a", 8, 1.1, -math.inf, math.inf)], "x").to_dict())[0]
    assert (offer["replicas"], offer["value"], offer["low"]) == ("8", "1.1", "")
    choice = rows_of(pareto([Choice("nodes 2", 9e4, 16, 2e9, True)]).to_dict())[0]
    assert choice == {"scenario": "nodes 2", "ms": "90", "devices": "16", "gigabytes": "2",
                      "front": "nothing beats it"}
    stalls = rows_of(cache_stalls([("lru", 1000.0, 250.0, 0.9)]).to_dict())
    assert [r["ms"] for r in stalls] == ["1", "0.25"]
    arrive_LG = np.array([[0, 3], [1, 0]])
    moved = rows_of(switch_moves(arrive_LG, "to b").to_dict())
    assert [int(r["experts"]) for r in moved] == [0, 3, 1, 0]
    waits = rows_of(answered_within({"a": np.array([1e3, 3e3])}).to_dict())
    assert (float(waits[0]["ms"]), float(waits[-1]["ms"])) == (1.0, 3.0)
