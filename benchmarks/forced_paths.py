"""Every way this processor can multiply, each forced in a process of its own, and rows compared.

    python benchmarks/forced_paths.py '{"widths": [[128, 48]], "backends": ["auto"]}'

runs one comparison in this process and prints its findings as JSON; `run` does so with a path
forced. Libraries choose their code by the processor they find, and can be told to find an older
one: oneDNN, MKL, torch's own loops and our compiled ones, all alike. Rows are compared without
the package's own check (`kernels/self_check.py`), with other rows and weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BASE = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt"
_AVX2 = f"{_BASE},+avx,+avx2,+fma,+bmi,+bmi2,+lzcnt,+f16c"
_AVX512 = f"{_AVX2},+avx512f,+avx512cd,+avx512bw,+avx512dq,+avx512vl"


@dataclass(frozen=True)
class ForcedPath:
    """What the processor is taken for. needs: flags (of /proc/cpuinfo) without which it cannot."""

    name: str
    needs: tuple[str, ...]
    onednn: str
    torch: str
    numba: tuple[str, str] | None = None      # name of the processor and its features

    @property
    def environment(self) -> dict[str, str]:
        told = {"ONEDNN_MAX_CPU_ISA": self.onednn, "ATEN_CPU_CAPABILITY": self.torch}
        if self.numba is not None:
            told |= dict(zip(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"), self.numba, strict=True))
        return told


PATHS = (
    ForcedPath("sse4.1", ("sse4_1",), "SSE41", "default", ("nehalem", _BASE)),
    ForcedPath("avx2", ("avx2", "fma"), "AVX2", "avx2", ("haswell", _AVX2)),
    ForcedPath("avx512", ("avx512f",), "AVX512_CORE", "avx512", ("skylake-avx512", _AVX512)),
    ForcedPath("avx512_vnni", ("avx512_vnni",), "AVX512_CORE_VNNI", "avx512"),
    ForcedPath("avx512_bf16", ("avx512_bf16",), "AVX512_CORE_BF16", "avx512"),
    ForcedPath("amx_bf16", ("amx_bf16",), "AVX512_CORE_AMX", "avx512"),
    ForcedPath("as found", (), "DEFAULT", ""),
)


def processor_flags() -> frozenset[str]:
    """What /proc/cpuinfo says of the first processor; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def missing(path: ForcedPath) -> str:
    """Why a path cannot be forced here; "" where it can."""
    absent = [flag for flag in path.needs if flag not in processor_flags()]
    return f"this processor has no {', '.join(absent)}" if absent else ""


def run(path: ForcedPath, **question: Any) -> dict[str, Any]:
    """The findings of `find` with a path forced."""
    tree = Path(__file__).resolve().parents[1]
    found = {k: v for k, v in os.environ.items() if k not in ForcedPath("", (), "", "").environment}
    # What `make` and the tests run under: the package by the name of its folder, or installed.
    known = [str(tree.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = found | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(known),
        **{k: v for k, v in path.environment.items() if v},
    }
    ran = subprocess.run(
        [sys.executable, __file__, json.dumps(question)], env=environment, text=True,
        capture_output=True, check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"{path.name}: {ran.stderr.strip()[-2000:]}")
    findings: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return findings


def find(
    widths: Sequence[Sequence[int]],
    backends: Sequence[str] = ("auto",),
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    dense: Sequence[Sequence[int]] = (),
    model: bool = False,
) -> dict[str, Any]:
    """In this process: which rows have other bits alone or elsewhere than in a batch.

    widths: (hidden, intermediate) of experts, tried on each of the backends; `auto` is the one
    that a rank would take. dense: (inputs, outputs) of layers as a rank holds them. model: whether
    requests of the reference model keep their bits in company.
    """
    import torch

    torch.set_num_threads(1)
    findings: dict[str, Any] = {"chosen": {}, "refused": [], "cases": 0, "faults": []}
    for dtype in dtypes:
        for hidden, intermediate in widths:
            for backend in backends:
                _try_experts(findings, hidden, intermediate, dtype, backend)
        for inputs, outputs in dense:
            _try_dense(findings, inputs, outputs, dtype)
        if model:
            findings["cases"] += 1
            findings["faults"] += [f"reference model in {dtype}: {n}" for n in _model_notes(dtype)]
    return findings


def _try_experts(
    findings: dict[str, Any], hidden: int, intermediate: int, dtype: str, backend: str
) -> None:
    import torch

    from loadmaster.errors import InputError
    from loadmaster.kernels.activation import ExpertActivation
    from loadmaster.kernels.grouped import ExpertWeights, grouped_experts
    from loadmaster.kernels.self_check import drawn

    kind = getattr(torch, dtype)
    try:
        weights = ExpertWeights.allocate(
            2, hidden, intermediate, dtype=kind, device="cpu", activation=ExpertActivation("silu"),
            backend=backend,
        )
    except InputError:
        return                                # not on this processor: not what a rank would take
    for slot in (0, 1):
        weights.set_slot(
            slot,
            drawn((2 * intermediate, hidden), kind, seed=10 + slot, scale=hidden**-0.5),
            drawn((hidden, intermediate), kind, seed=20 + slot, scale=intermediate**-0.5),
        )

    def compute(x: Any) -> Any:
        """Rows through slot 1, after five others through slot 0."""
        before = x[:1].expand(5, -1)
        counts = torch.tensor([5, len(x)])
        return grouped_experts(torch.cat((before, x)), counts, weights)[5:]

    name = f"experts {hidden} x {intermediate} in {dtype} on {weights.backend}"
    findings["chosen"].setdefault(backend, {}).setdefault(weights.backend, 0)
    findings["chosen"][backend][weights.backend] += 1
    findings["refused"] += list(weights.refused)
    _compare(findings, name, compute, hidden, kind)


def _try_dense(findings: dict[str, Any], inputs: int, outputs: int, dtype: str) -> None:
    import torch

    from loadmaster.kernels.cpu.dense import make_rowwise
    from loadmaster.kernels.self_check import drawn

    kind = getattr(torch, dtype)
    layer = torch.nn.Linear(inputs, outputs, dtype=kind).requires_grad_(False)
    layer.weight.copy_(drawn((outputs, inputs), kind, seed=30, scale=inputs**-0.5))
    findings["refused"] += make_rowwise(layer).refused
    _compare(findings, f"dense {inputs} x {outputs} in {dtype}", layer, inputs, kind)


def _compare(findings: dict[str, Any], name: str, compute: Any, width: int, kind: Any) -> None:
    """One batch of many rows against its pieces, itself moved along, and one row at all places."""
    import torch

    rows = torch.randn(97, width, generator=torch.Generator().manual_seed(3)).to(kind)
    whole = compute(rows)
    findings["cases"] += 1
    for what, piece, want in _batches(rows, whole):
        if not torch.equal(compute(piece.contiguous()), want):
            findings["faults"].append(f"{name}: {what}")
            return


def _batches(rows: Any, whole: Any) -> Iterator[tuple[str, Any, Any]]:
    for count in (1, 2, 3, 4, 5, 8, 13, 16, 17, 33, 64):
        for start in sorted({0, 20, 97 - count}):
            part = slice(start, start + count)
            yield f"{count} rows from row {start}", rows[part], whole[part]
    for shift in (1, 6, 41):
        yield f"moved by {shift}", rows.roll(shift, 0), whole.roll(shift, 0)
    yield "one row 340 times", rows[7:8].expand(340, -1), whole[7:8].expand(340, -1)


def _model_notes(dtype: str) -> Sequence[str]:
    from loadmaster.placement.cluster import Cluster
    from loadmaster.workers.protocol.settings import RankSettings
    from loadmaster.workers.rank.rank import Rank
    from loadmaster.workers.reference import reference_model_dir

    cluster = Cluster.preset("cpu", devices_per_node=1, slots_per_device=32)
    loaded = Rank(RankSettings(0, 1, str(reference_model_dir()), cluster, dtype)).load()
    return [note for note in loaded.notes if "in company" in note]


if __name__ == "__main__":
    print(json.dumps(find(**json.loads(sys.argv[1]))))
