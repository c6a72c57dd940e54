"""A row keeps its bits on every path that oneDNN, torch and our own loops can take here.

Each path is forced in a process of its own: what the machine at hand takes by itself is one of
them, and another machine takes another.
"""

from typing import Any

import pytest

from benchmarks.forced_paths import PATHS, ForcedPath, missing, run


def question(path: ForcedPath, **asked: Any) -> dict[str, Any]:
    if missing(path):
        pytest.skip(f"{path.name}: {missing(path)}")
    found = run(path, **asked)
    assert found["faults"] == []
    return found


@pytest.mark.parametrize("path", PATHS[:3], ids=lambda path: path.name)
def test_rows_keep_their_bits_on_every_backend_of_a_forced_path(path: ForcedPath) -> None:
    """Narrow experts and layers, the widths of vectors and odd ones."""
    found = question(
        path, widths=[(128, 48), (200, 72)], backends=["auto", "packed", "torch", "panels"],
        dense=[(128, 256), (200, 1)],
    )
    # Our own loops are forced as well, or the paths would all be one.
    fused = path.name != "sse4.1"
    assert ("panels" in found["chosen"]["auto"]) == fused == ("panels" in found["chosen"])


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_wide_rows_keep_their_bits_on_the_backend_that_a_rank_takes(path: ForcedPath) -> None:
    """Widths at which oneDNN takes other code for one row."""
    found = question(path, widths=[(2048, 768)])
    assert found["cases"] == 2
