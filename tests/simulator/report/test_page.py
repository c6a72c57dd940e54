"""The page: one file that asks no network for anything and holds the answer itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from loadmaster.errors import LoadmasterError
from loadmaster.simulator.report.charts.load_map import load_map
from loadmaster.simulator.report.page import render_page, write_page
from loadmaster.simulator.report.pictures import write_pictures
from loadmaster.simulator.report.report import Picture, Report, Table

EVIL = "</script><script>alert(1)</script> <b> & \u2028"
VOID = {"meta", "link"}


class _Page(HTMLParser):
    """Tags in order, texts of scripts by their id, visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self.seen = ""
        self._id = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self._id = dict(attrs).get("id") or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self._id] = self.scripts.get(self._id, "") + data
        elif self.open and self.open[-1] != "style":
            self.seen += data


def small(**changed) -> Report:
    fields = {
        "title": f"Plan {EVIL}", "verdict": f"leave it {EVIL}",
        "draw": lambda: (
            Picture("load", "Load", (load_map(np.ones((3, 4)), EVIL, 2.0),) * 2, "caption"),
        ),
        "tables": (Table("Plans", ("plan", "figure"), ((EVIL, "1.5"),)),
                   Table("Long", ("a",), (("1",),), folded=True)),
        "judged_on": ("12 steps",), "notes": (EVIL,),
        "document": {"verdict": EVIL, "value": float("nan"), "array": np.arange(3)},
    }
    return Report(**(fields | changed))


@pytest.fixture(scope="module")
def text() -> str:
    return render_page(small())


def test_it_is_well_formed_and_whatever_is_in_a_name_stays_text(text) -> None:
    page = _Page(text)
    assert not page.open
    assert "b" not in page.tags and page.tags.count("script") == 4
    assert page.seen.count(EVIL) >= 3


def test_it_refers_to_nothing_outside_itself(text) -> None:
    """No element that fetches, and a policy that would forbid it."""
    markup = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?:|src=|@import|url\(|<iframe|<img", markup)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and "default-src 'none'" in policy[1] and "http" not in policy[1]


def test_the_answer_travels_inside_it(text) -> None:
    held = json.loads(_Page(text).scripts["document"])
    assert held == {"verdict": EVIL, "value": None, "array": [0, 1, 2]}


def test_it_holds_a_chart_for_every_picture(text) -> None:
    specs = json.loads(_Page(text).scripts["specs"])
    assert list(specs) == ["load-0", "load-1"]
    assert all(f'id="{name}"' in text for name in specs)


def test_the_verdict_comes_first_then_its_picture_then_tables(text) -> None:
    order = [text.index(part) for part in
             ('class="verdict"', "<h2>Load", "<h2>Plans", "<details>", "What this was judged on",
              "<h2>Notes", "<footer>")]
    assert order == sorted(order)


def test_without_pictures_it_carries_no_vega() -> None:
    assert len(render_page(small(draw=tuple))) < 20_000


def test_equal_reports_give_equal_pages(text) -> None:
    assert render_page(small()) == text


def test_it_is_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "report.html"
    write_page(path, small(draw=tuple))
    before = path.read_text()
    with pytest.raises(UnicodeEncodeError):
        write_page(path, small(draw=tuple, verdict="\ud800"))
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_pictures_are_files_named_by_what_they_show(tmp_path) -> None:
    written = write_pictures(tmp_path / "new" / "folder", small())
    assert [p.name for p in written] == ["load.png"]
    assert written[0].read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(LoadmasterError, match="taken/folder: cannot be written"):
        write_pictures(tmp_path / "taken" / "folder", small())
