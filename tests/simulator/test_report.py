"""The report is one file that needs nothing else, the same for the same input."""

import re
from pathlib import Path

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.simulator.report.page import Table, relative_loads, write_report
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth import synth_trace


@pytest.fixture(scope="module")
def shown() -> dict[str, object]:
    trace = synth_trace(layers=3, experts=8, top_k=2, tokens=3000, seed=1)
    cluster = Cluster.preset("cpu", devices_per_node=4, slots_per_device=2)
    slots = np.arange(8, dtype=np.int16).reshape(1, 4, 2).repeat(3, axis=0)
    plans = {"a <b>": Plan(slots=slots, num_experts=8),
             "other": Plan(slots=slots[:, ::-1], num_experts=8)}
    steps = StepSampler(tokens=128, concurrency=8).sample(trace)
    return {"trace": trace, "cluster": cluster, "plans": plans, "steps": steps}


def test_the_page_fetches_nothing_and_escapes_names(shown: dict[str, object], tmp_path: Path
                                                     ) -> None:
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, title="t & t", verdict="leave it",
                     tables=[Table("figures", ("", "x"), [("a <b>", "1")])], notes=("n",),
                     **shown)  # type: ignore[arg-type]
    text = (tmp_path / "one.html").read_text()
    assert (tmp_path / "two.html").read_text() == text
    assert "leave it" in text and "t &amp; t" in text and text.count("<svg") == 3
    assert "a <b>" not in text
    assert not re.search(r"""(src|href)=["']https?:""", text)
    assert "<script" not in text


def test_relative_loads_are_loads_over_their_mean(shown: dict[str, object]) -> None:
    loads, imbalance = relative_loads(**shown)  # type: ignore[arg-type]
    for load_LG in loads.values():
        np.testing.assert_allclose(load_LG.mean(axis=1), 1.0)
    assert all((values >= 1.0).all() for values in imbalance.values())
    np.testing.assert_allclose(loads["other"], loads["a <b>"][:, ::-1])
