"""What all tests share: the real data beside the checkout, where it is present."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports Triton: its kernels then run on the CPU, interpreted.
os.environ["TRITON_INTERPRET"] = "1"

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real traces and tables; skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real data not present: {DATA}")
    return DATA
