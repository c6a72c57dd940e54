"""Compiled arithmetic: which door relaxes what; random bits as published."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np

from loadmaster.foundation.compiled import compiled, compiled_fused, splitmix


def _rest(x: float, y: float, product: float) -> Any:
    return x * y - product


def test_a_product_fuses_into_a_sum_through_one_door_only() -> None:
    """The exact rest of a rounded product is 0 unless the product was never rounded."""
    x = 1.0 + 2.0**-30
    assert _rest(x, x, x * x) == 0.0
    assert compiled(_rest)(x, x, x * x) == 0.0
    assert compiled_fused(_rest)(x, x, x * x) in (0.0, 2.0**-60)     # 0 without such a machine op


def test_splitmix_gives_the_published_numbers() -> None:
    """The first three outputs of splitmix64 from seed 0."""
    @numba.njit
    def outputs(n: int) -> Any:
        state, out = np.uint64(0), np.empty(n, np.uint64)
        for i in range(n):
            state += np.uint64(0x9E3779B97F4A7C15)
            out[i] = splitmix(state)
        return out

    assert [hex(x) for x in outputs(3).tolist()] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f",
    ]


def test_compiled_code_of_before_that_names_what_is_gone_is_compiled_again(tmp_path: Path) -> None:
    """An upgrade renames a class in one file; cached loops of another still name the old one."""
    (tmp_path / "loops.py").write_text(
        "from loadmaster.foundation.compiled import compiled\n"
        "@compiled\n"
        "def doubled(pair):\n"
        "    return 2 * pair.first\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    for name in ("Before", "After"):
        (tmp_path / "shapes.py").write_text(
            f"from typing import NamedTuple\nclass {name}(NamedTuple):\n    first: int\n"
        )
        code = f"import loops, shapes; print(loops.doubled(shapes.{name}(21)))"
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, check=False)
        assert done.stdout == "42\n", done.stderr[-2000:]
