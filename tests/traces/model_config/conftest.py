"""A model's folder written as a test wants it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write config.json (or `file`) of these fields, and the files beside it; the folder."""

    def made(
        fields: dict[str, Any], file: str = "config.json",
        beside: dict[str, Any] | None = None,
    ) -> Path:
        for name, content in {file: fields, **(beside or {})}.items():
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return made
