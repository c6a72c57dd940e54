"""The Triton kernels on a real H100 or H200: right first, then timed.

    python benchmarks/kernels_gpu.py [--json] [--routing IDS.npy] [--tune] [--rehearse]

Checks every path against float64 and against itself bit for bit (`kernels_gpu_checks.py`), reads
the roofline of this device (an 8192-cubed bfloat16 product, a device copy), then times the layer
of E128 H2048 I768 K8 (sort, gather, grouped experts, combine) beside
`torch.nn.functional.grouped_mm` and transformers' own experts implementations, at uniform and
skewed routing. Writes benchmarks/results/kernels_gpu_<device>.json; commit that file.

--routing   recorded ids, an integer array [tokens, K] or [tokens, layers, K] with ids < 128
--tune      first search block sizes and write kernels/gpu/tile_configs.json (a few minutes)
--rehearse  walk through everything on the CPU, interpreted and tiny; times mean nothing then and
            nothing is written

Event times, medians, weight sets rotated so that the L2 cache cannot help.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from kernels_gpu_shapes import Shape, median_us

RESULTS = Path(__file__).parent / "results"


FULL = Shape(128, 2048, 768, 8, (1, 16, 128, 512, 2048, 4096, 8192, 32768))
TINY = Shape(8, 32, 16, 2, (8,))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--routing", type=Path, help="recorded ids, .npy")
    parser.add_argument("--tune", action="store_true", help="search block sizes first")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, interpreted")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU here; --rehearse walks through the script without one")
    from kernels_gpu_checks import check_all
    from kernels_gpu_tune import tune

    shape = TINY if arguments.rehearse else FULL
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    result: dict[str, Any] = {"machine": machine(device), "shape": vars(shape)}
    result["checks"] = check_all(device)
    if not all(check["holds"] for check in result["checks"].values()):
        sys.exit(f"wrong results, nothing timed: {json.dumps(result['checks'], indent=1)}")
    if arguments.tune and not arguments.rehearse:
        tune(shape, device)
    result["roofline"] = roofline(device)
    result["layer"] = time_layers(shape, device, arguments.routing, result["roofline"])
    result["targets"] = judge(result["layer"])
    result["holds"] = all(target["holds"] for target in result["targets"].values())
    text = json.dumps(result, indent=1)
    if not arguments.rehearse:
        RESULTS.mkdir(exist_ok=True)
        name = torch.cuda.get_device_name(device).replace(" ", "_")
        (RESULTS / f"kernels_gpu_{name}.json").write_text(text + "\n")
    print(text if arguments.json else json.dumps(result["targets"], indent=1))


def machine(device: Any) -> dict[str, str]:
    """What the figures were taken on."""
    import torch
    import transformers
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def roofline(device: Any) -> dict[str, float]:
    """What this device reaches on one large product and on a copy, in this run."""
    import torch

    size = 8192 if device.type == "cuda" else 64
    a = torch.randn(size, size, device=device).bfloat16()
    product_us = median_us(device, [lambda: a @ a])
    size_bytes = 1 << (30 if device.type == "cuda" else 16)
    block = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    copy = torch.empty_like(block)
    copy_us = median_us(device, [lambda: copy.copy_(block)])
    return {
        "tflops": 2.0 * size**3 / product_us / 1e6,
        "bytes_per_s": 2.0 * block.numel() / copy_us * 1e6,
    }


def time_layers(
    shape: Shape, device: Any, routing: Path | None, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """One record per token count and kind of routing."""
    from kernels_gpu_layers import Layers, draw_logits

    layers = Layers(shape, device)
    kinds = ["uniform", "zipf", "half_empty", "one_hot"] + (["recorded"] if routing else [])
    records = []
    for tokens in shape.tokens:
        for kind in kinds:
            print(f"{tokens} tokens, {kind} ...", file=sys.stderr)
            logits = draw_logits(shape, tokens, kind, routing, device)
            record = layers.time(tokens, logits, kind)
            floor_bytes_us = record["active_experts"] * shape.expert_bytes / limits["bytes_per_s"]
            floor_flops_us = shape.flops(tokens) / limits["tflops"] / 1e6
            record["floor_us"] = max(floor_bytes_us * 1e6, floor_flops_us)
            record["of_floor"] = record["floor_us"] / record["us"]["layer"]
            record["tflops"] = shape.flops(tokens) / record["us"]["layer"] / 1e6
            records.append(record)
    return records


def judge(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The targets, on the uniform records."""
    uniform = [r for r in records if r["kind"] == "uniform"]
    small = [r for r in uniform if r["tokens"] <= 512]
    large = [r for r in uniform if r["tokens"] >= 8192]

    def target(wanted: str, values: list[float], least: float) -> dict[str, Any]:
        holds = bool(values) and all(value >= least for value in values)
        return {"target": wanted, "values": values, "holds": holds}

    by_tokens = {r["tokens"]: r["tflops"] for r in uniform}
    return {
        "small_batches": target(
            ">= 0.75 of the floor at T <= 512", [r["of_floor"] for r in small], 0.75
        ),
        "t8192": target(">= 430 TFLOP/s", [by_tokens.get(8192, 0.0)], 430.0),
        "t32768": target(">= 450 TFLOP/s", [by_tokens.get(32768, 0.0)], 450.0),
        "transformers_small": target(
            ">= 1.5 times grouped_mm at T <= 512", [r["over_grouped_mm"] for r in small], 1.5
        ),
        "transformers_large": target(
            ">= 1.3 times grouped_mm at T >= 8192", [r["over_grouped_mm"] for r in large], 1.3
        ),
    }


if __name__ == "__main__":
    main()
