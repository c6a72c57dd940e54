"""A report as one self-contained HTML file: it opens anywhere and asks no network for anything.

The page carries Vega and the charts' figures; a content policy in it forbids every request. Light,
dark and print are the page's affair: charts have no text colours of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...foundation.atomic_file import replacing
from ...foundation.plain_values import plain
from ...foundation.version import VERSION
from .report import Report

TEMPLATES = Path(__file__).with_name("templates")


def render_page(report: Report) -> str:
    """The page as text; the same report gives the same text."""
    import vl_convert
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    pictures = report.draw()
    specs = {
        f"{picture.name}-{n}": chart.to_dict()
        for picture in pictures for n, chart in enumerate(picture.charts)
    }
    return environment.get_template("report.html.j2").render(
        report=report, lead=pictures[:1], pictures=pictures[1:], version=VERSION,
        specs=script_json(specs), document=script_json(dict(report.document)),
        vega=vl_convert.javascript_bundle() if specs else "",  # type: ignore[call-arg]
    )


def write_page(path: str | Path, report: Report) -> None:
    """Write the page whole or not at all."""
    text = render_page(report)
    with replacing(Path(path)) as file:
        file.write(text.encode())


def script_json(value: Any) -> str:
    """JSON that a script element can hold: it cannot end the element; NaN becomes null."""
    text = json.dumps(plain(value), separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
