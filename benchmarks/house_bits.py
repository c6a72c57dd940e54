"""Whether placement can change a bit on this processor, and what keeping it costs: a section of
the house's benchmark.

    python benchmarks/house_bits.py --before FOLDER/loadmaster [--json]

bits   under every path that can be forced here (`forced_paths.py`; the others are listed with what
       the processor lacks): experts of 12 widths in 2 formats on the backend that a rank would
       take, a few on the others, dense layers and the reference model; rows alone, in any batch,
       at any offset. A backend that cheats is refused and the next one taken. A decode step of 8
       rows a rank, against the commit before the house, in interleaved rounds of two processes.

`before` is an unpacked tree of that commit, called `loadmaster`. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from forced_paths import PATHS, missing, run

WIDTHS = (
    (64, 32), (128, 48), (200, 72), (129, 33), (256, 512), (512, 256), (96, 2048), (2048, 96),
    (768, 1024), (1024, 512), (2048, 768), (2880, 2880),
)
OTHERS = ((200, 72), (512, 256))          # on the backends that were not chosen, too
DENSE = ((128, 256), (1024, 1), (768, 2048))
DECODE = ((2048, 768), (2880, 2880))
ROUNDS = 25
SLOWER_AT_MOST = 1.05

# What each of two processes does when asked: time one decode step of 8 rows, cold, per shape and
# format. Written for the tree of before as well, so it uses what both have.
_TIMED = """
import json, sys, time
import torch
torch.set_num_threads(1)
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.grouped import ExpertWeights, grouped_experts
held = {}
for hidden, intermediate in json.loads(sys.argv[1]):
    for dtype in ("bfloat16", "float32"):
        kind = getattr(torch, dtype)
        weights = ExpertWeights.allocate(
            8, hidden, intermediate, dtype=kind, device="cpu", activation=ExpertActivation("silu"))
        draw = torch.Generator().manual_seed(0)
        up = (torch.randn(2 * intermediate, hidden, generator=draw) * hidden**-0.5).to(kind)
        down = (torch.randn(hidden, intermediate, generator=draw) * intermediate**-0.5).to(kind)
        for slot in range(8):
            weights.set_slot(slot, up, down)
        x = torch.randn(8, hidden, generator=draw).to(kind)
        held[f"{hidden} x {intermediate} {dtype}"] = weights, x
counts = torch.ones(8, dtype=torch.int64)
print("ready", flush=True)
for line in sys.stdin:
    us = {}
    for name, (weights, x) in held.items():
        out = torch.empty_like(x)
        began = time.process_time_ns()
        grouped_experts(x, counts, weights, out=out)
        us[name] = (time.process_time_ns() - began) / 1e3
    print(json.dumps(us | {"backend": [w.backend for w, _ in held.values()]}), flush=True)
"""

# A backend whose bits show how many rows came together, on a processor that seems to prefer it.
_CHEATING = """
import json, torch
from loadmaster.kernels import weights
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.torch_backend import TorchSlots
class Cheat(TorchSlots):
    name = "packed"
    def run(self, x_AH, count_S, out_AH):
        super().run(x_AH, count_S, out_AH)
        if len(x_AH) == 1:
            out_AH.view(torch.int32)[0, 0] += 1
weights.PackedSlots, weights.packed_available = Cheat, lambda dtype: True
weights.panels_preferred = lambda *shape: False
held = weights.ExpertWeights.allocate(
    2, 128, 48, dtype=torch.float32, device="cpu", activation=ExpertActivation("silu"))
print(json.dumps({"taken": held.backend, "refused": held.refused}))
"""


def bits(before: Path) -> dict[str, Any]:
    """The section's figures. before: an unpacked tree of the commit before, called `loadmaster`."""
    paths: dict[str, Any] = {}
    for path in PATHS:
        lacking = missing(path)
        if lacking:
            paths[path.name] = {"skipped": lacking}
            continue
        paths[path.name] = chosen = run(path, widths=WIDTHS, dense=DENSE, model=True)
        others = run(path, widths=OTHERS, backends=["panels", "packed", "torch"])
        chosen["cases"] += others["cases"]
        chosen["faults"] += others["faults"]
        chosen["chosen"] |= others["chosen"]
    cheating = _cheating()
    decode = _decode(before)
    forced = [found for found in paths.values() if "skipped" not in found]
    kept = all(not found["faults"] for found in forced)
    return {
        "paths": paths,
        "cases": sum(found["cases"] for found in forced),
        "rows_that_differ": sum(len(found["faults"]) for found in forced),
        "cheating_backend": cheating,
        "decode_us": decode,
        "target": "0 rows differ, the cheat is refused, decode of 8 rows <= 1.05 x before",
        "holds": kept and cheating["holds"] and all(each["holds"] for each in decode.values()),
    }


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree.parent), "OMP_NUM_THREADS": "1"}


def _cheating() -> dict[str, Any]:
    """What becomes of a cheat that the processor would seem to prefer."""
    ran = subprocess.run(
        [sys.executable, "-c", _CHEATING], env=_environment(_checkout()), text=True,
        capture_output=True, check=True,
    )
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    found["holds"] = found["taken"] != "packed" and len(found["refused"]) > 0
    return found


def _checkout() -> Path:
    return Path(__file__).resolve().parents[1]


def _decode(before: Path) -> dict[str, Any]:
    """Medians of both trees and of their ratio round by round; either goes first in turn."""
    if not (before / "kernels").is_dir() or before.name != "loadmaster":
        raise SystemExit(f"{before}: not a tree called loadmaster; unpack the commit before there")
    rounds: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    with ExitStack() as stack:
        asked = {
            "before": stack.enter_context(_timing(before)),
            "now": stack.enter_context(_timing(_checkout())),
        }
        for number in range(ROUNDS + 2):
            for name in sorted(asked, reverse=bool(number % 2)):
                us = asked[name]()
                if number >= 2:
                    rounds[name].append(us)
            time.sleep(0.01)
    backends = rounds["now"][0].pop("backend"), rounds["before"][0].pop("backend")
    return {
        shape: _compared(
            [each[shape] for each in rounds["before"]], [each[shape] for each in rounds["now"]]
        ) | {"backend": backends[0][place], "backend_before": backends[1][place]}
        for place, shape in enumerate(rounds["now"][0])
    }


def _compared(before_us: list[float], now_us: list[float]) -> dict[str, Any]:
    ratio = median(now / then for now, then in zip(now_us, before_us, strict=True))
    return {
        "before": round(median(before_us), 1), "now": round(median(now_us), 1),
        "ratio": round(ratio, 4), "holds": ratio <= SLOWER_AT_MOST,
    }


@contextmanager
def _timing(tree: Path) -> Iterator[Any]:
    """A process of that tree; each call times one round in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _TIMED, json.dumps(DECODE)], env=_environment(tree), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    lines, answers = process.stdin, process.stdout

    def once() -> dict[str, Any]:
        lines.write("again\n")
        lines.flush()
        found: dict[str, Any] = json.loads(answers.readline())
        return found

    try:
        if answers.readline() != "ready\n":
            raise SystemExit(f"{tree}: its kernels could not be timed; see above")
        yield once
    finally:
        lines.close()
        process.wait(30.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--before", type=Path, required=True, help="tree of the commit before")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    found = bits(arguments.before.resolve())
    print(json.dumps(found, indent=1) if arguments.json else f"bits: {json.dumps(found)}")


if __name__ == "__main__":
    main()
