"""What the kernels cost on this CPU, and whether they keep their promises.

    python benchmarks/kernels.py [--json] [--only cpu routing_share exact oracle sm90 gpu fit]

cpu            the whole expert layer (sort, gather, grouped experts, combine) against dense packed
               oneDNN products over as many rows and against transformers' `grouped_mm`: prefill,
               decode, a Mixtral-like layer
routing_share  sort and combine over the layer, at prefill
exact          one token, one bit pattern: random plans, splits and batches in bfloat16
oracle         error against float64 over odd shapes
sm90           every Triton kernel compiled for Hopper: registers, matrix instructions, spills
gpu            what benchmarks/kernels_gpu.py measured and committed; null where nothing was
fit            a table fitted to some token counts, judged on others

One torch thread; CPU time of the process; medians, interleaved. Each figure stands beside its
target, and `holds` says whether it is met.

This file must stay cheap to import: transformers looks for a package called `kernels`, and beside
a benchmark script it finds this one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


# Each benchmark is the function of its name in the module named here.
MODULES = {
    "cpu": "kernels_cpu",
    "routing_share": "kernels_cpu",
    "exact": "kernels_checks",
    "oracle": "kernels_checks",
    "sm90": "kernels_checks",
    "gpu": "kernels",
    "fit": "kernels_fit",
}


def gpu() -> dict[str, Any]:
    """The committed results of every device that was measured, or why there are none."""
    found = sorted(RESULTS.glob("kernels_gpu_*.json"))
    if not found:
        return {
            "results": None,
            "holds": None,
            "reason": "no H100 or H200 could be had; run benchmarks/kernels_gpu.py on one",
        }
    results = {
        path.stem.removeprefix("kernels_gpu_"): json.loads(path.read_text()) for path in found
    }
    return {"results": results, "holds": all(result["holds"] for result in results.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import torch

    torch.set_num_threads(1)
    results = {}
    for name in arguments.only:
        print(f"{name} ...", file=sys.stderr)
        results[name] = getattr(importlib.import_module(MODULES[name]), name)()
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        for name, result in results.items():
            print(f"{name}: {json.dumps(result)}")


if __name__ == "__main__":
    main()
