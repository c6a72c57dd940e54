"""What all tests share: the real data beside the checkout, where it is present."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports Triton: its kernels then run on the CPU, interpreted.
os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes says nothing of the code where processors are shared.
settings.register_profile("loadmaster", deadline=None)
settings.load_profile("loadmaster")

# Tests of groups, tasks and jobs on Ray: they mostly wait.
ON_RAY = tuple(f"tests/workers/{at}" for at in ("demo/", "fleet/", "group/", "jobs/", "test_cli"))

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real traces and tables; skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real data not present: {DATA}")
    return DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits, the longest waits first: others compute meanwhile."""
    items.sort(key=lambda item: (
        not item.nodeid.startswith(ON_RAY),
        item.nodeid.startswith(ON_RAY) and item.get_closest_marker("slow") is None,
    ))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return FilesTogether(config, log) if config.getvalue("dist") == "loadfile" else None


class FilesTogether(LoadFileScheduling):
    """Where several processes test: a file's tests share one, and so does all that needs Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return "on Ray" if nodeid.startswith(ON_RAY) else super()._split_scope(nodeid)
