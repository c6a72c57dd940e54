"""Record which slots the serving engines' own functions choose, for the tests of our rules.

    python benchmarks/record_engine_choices.py --vllm WHEEL --sglang WHEEL --vllm-ascend FILE

WHEEL: the engine's wheel as its registry serves it (`pip download --no-deps vllm==0.33.0`,
`sglang==0.5.23`). FILE: vllm-ascend's `vllm_ascend/eplb/core/eplb_utils.py`. Each function is taken
out of the engine's source by name and run on the CPU as it stands, Triton kernels in Triton's own
interpreter; what the engine would ask of its configuration (ranks, nodes, backend) is answered
here. Written to `tests/placement/dispatch/engine_choices.json`: inputs and chosen slots, with each
engine's version; and to `tests/placement/methods/engine_layouts.json`: which experts vLLM gives
each rank unasked. TensorRT-LLM's rule is a CUDA kernel and does not run without a GPU.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import tempfile
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"      # read when a kernel is defined

import torch
import triton
import triton.runtime.interpreter as interpreter

TESTS = Path(__file__).resolve().parents[1] / "tests" / "placement"
LAYOUT = "vllm/model_executor/layers/fused_moe/expert_map_manager.py"
ROUTER = "vllm/model_executor/layers/fused_moe/router/base_router.py"
LOCATION = "sglang/srt/eplb/expert_location.py"
DISPATCH = "sglang/srt/eplb/expert_location_dispatch.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("vllm", "sglang", "vllm-ascend"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    machine: Any = interpreter
    machine._interpreter = BooleanMasks(machine._interpreter)
    recorded = {
        "vllm_hash": vllm_hash(options.vllm),
        "sglang_static": sglang_static(options.sglang),
        "sglang_rows": sglang_rows(options.sglang),
        "ascend_fixed": ascend_fixed(options.vllm_ascend),
    }
    (TESTS / "dispatch" / "engine_choices.json").write_text(_compact(recorded))
    layouts = {"default_layout": default_layout(options.vllm)}
    (TESTS / "methods" / "engine_layouts.json").write_text(_compact(layouts))


# ---- inputs ---------------------------------------------------------------------------------


def random_slots(rng: np.random.Generator, experts: int, slots: int) -> list[int]:
    """[S] every expert once, the rest to a few hot ones, in random places."""
    hot = rng.choice(experts, size=max(1, experts // 4), replace=False)
    held = np.r_[np.arange(experts), rng.choice(hot, slots - experts)]
    return [int(e) for e in rng.permutation(held)]


def random_ids(
    rng: np.random.Generator, tokens: int, choices: int, experts: int
) -> list[list[int]]:
    """[T, K] different experts per token, the low ids more often."""
    weight = 1.0 / (1.0 + np.arange(experts))
    return [
        rng.choice(experts, choices, replace=False, p=weight / weight.sum()).tolist()
        for _ in range(tokens)
    ]


def replicas_of(slots: list[int], experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([E, X] slots ascending, padded with -1; [E] how many)."""
    held = [[s for s, e in enumerate(slots) if e == expert] for expert in range(experts)]
    most = max(map(len, held))
    padded = torch.tensor([row + [-1] * (most - len(row)) for row in held])
    return padded, torch.tensor([len(row) for row in held])


# ---- engines --------------------------------------------------------------------------------


def vllm_hash(wheel: Path) -> dict[str, Any]:
    """Its router's kernel: token ids of one rank in, slots out."""
    space: dict[str, Any] = {"torch": torch, "triton": triton, "tl": triton.language}
    take(wheel, ROUTER, ["_eplb_map_and_record_i32_kernel", "_eplb_map_and_record_triton"], space)
    cases = []
    for seed, (tokens, choices, experts, slots) in enumerate(
        [(64, 4, 16, 24), (40, 2, 8, 20), (33, 6, 12, 21), (50, 1, 5, 12)]
    ):
        rng = np.random.default_rng(seed)
        ids, layout = random_ids(rng, tokens, choices, experts), random_slots(rng, experts, slots)
        table, count = replicas_of(layout, experts)
        chosen = space["_eplb_map_and_record_triton"](
            topk_ids=torch.tensor(ids), logical_to_physical_map=table,
            logical_replica_count=count, expert_load_view=torch.zeros(slots, dtype=torch.int32),
            record_enabled=torch.ones(1, dtype=torch.int32),
            num_unpadded_tokens=torch.tensor([tokens], dtype=torch.int32),
        )
        cases.append({"experts": experts, "slots": layout, "ids": ids, "chosen": chosen.tolist()})
    return {"engine": version(wheel), "function": "_eplb_map_and_record_triton", "cases": cases}


def default_layout(wheel: Path) -> dict[str, Any]:
    """Experts of every rank where nobody placed them."""
    space: dict[str, Any] = {"torch": torch, "ExpertPlacementStrategy": str}
    take(wheel, LAYOUT, ["determine_expert_map"], space)
    cases = []
    for experts, ranks in ((60, 8), (10, 4), (5, 2), (17, 6), (64, 8), (7, 8)):
        maps = [space["determine_expert_map"](ranks, rank, experts)[1] for rank in range(ranks)]
        held = [torch.nonzero(row >= 0).flatten().tolist() for row in maps]
        cases.append({"experts": experts, "ranks": ranks, "held": held})
    return {"engine": version(wheel), "function": "determine_expert_map", "cases": cases}


def sglang_rows(wheel: Path) -> dict[str, Any]:
    """`dynamic` without an all-to-all backend: token ids of a whole batch in, slots out."""
    space: dict[str, Any] = {
        "torch": torch, "Optional": object, "ExpertLocationDispatchInfo": object,
    }
    take(wheel, DISPATCH, ["_topk_ids_logical_to_physical_dynamic"], space)
    cases = []
    for seed, (tokens, choices, experts, slots) in enumerate(
        [(64, 4, 16, 24), (41, 2, 8, 20), (1, 3, 6, 12)]
    ):
        rng = np.random.default_rng(100 + seed)
        ids, layout = random_ids(rng, tokens, choices, experts), random_slots(rng, experts, slots)
        table, count = replicas_of(layout, experts)
        info = SimpleNamespace(
            rank_invariant=True, partial_logical_to_all_physical_map=table,
            partial_logical_to_all_physical_map_num_valid=count,
        )
        chosen = space["_topk_ids_logical_to_physical_dynamic"](torch.tensor(ids), info)
        cases.append({"experts": experts, "slots": layout, "ids": ids, "chosen": chosen.tolist()})
    return {
        "engine": version(wheel), "function": "_topk_ids_logical_to_physical_dynamic",
        "cases": cases,
    }


def sglang_static(wheel: Path) -> dict[str, Any]:
    """The table of every rank for a whole plan, with an all-to-all backend."""
    parallel = SimpleNamespace(ep_size=0, nnodes=0)
    execution = SimpleNamespace(moe=SimpleNamespace(moe_a2a_backend="deepep", ep_join_mode=None))
    space: dict[str, Any] = {
        "torch": torch, "random": random, "List": list, "Optional": dict,
        "get_parallel": lambda: parallel, "get_exec": lambda: execution,
        "_prefer_same_node_experts": lambda: True,
    }
    take(wheel, LOCATION, [
        "_compute_logical_to_all_physical_map", "compute_logical_to_rank_dispatch_physical_map",
        "_logical_to_all_physical_raw", "_compute_gpu_id_of_physical_expert",
        "_compute_node_id_of_physical_expert", "_find_nearest_expert", "_fair_choices",
        "_pad_nested_array",
    ], space, annotations=False)
    cases = []
    for seed, (ranks, nodes, experts, width, layers) in enumerate(
        [(8, 1, 16, 3, 3), (8, 2, 16, 4, 3), (6, 3, 9, 2, 2), (4, 4, 6, 3, 2), (32, 1, 4, 1, 2)]
    ):
        rng = np.random.default_rng(200 + seed)
        layout = [random_slots(rng, experts, ranks * width) for _ in range(layers)]
        parallel.ep_size, parallel.nnodes = ranks, nodes
        tables = []
        for rank in range(ranks):
            found = space["_compute_logical_to_all_physical_map"](
                physical_to_logical_map=torch.tensor(layout), num_logical_experts=experts,
                ep_size=ranks, moe_ep_rank=rank,
            )
            tables.append(space["compute_logical_to_rank_dispatch_physical_map"](
                logical_to_all_physical_map=found, ep_size=ranks,
                num_physical_experts=ranks * width, ep_rank=rank,
            ).tolist())
        chosen = np.array(tables).transpose(1, 0, 2).tolist()      # [L, G, E]
        cases.append({
            "experts": experts, "ranks": ranks, "nodes": nodes, "slots": layout, "chosen": chosen,
        })
    return {
        "engine": version(wheel), "function": "compute_logical_to_rank_dispatch_physical_map",
        "cases": cases,
    }


def ascend_fixed(source: Path) -> dict[str, Any]:
    """The table of every rank for one layer, without and with tensor parallelism."""
    space: dict[str, Any] = {"torch": torch, "defaultdict": __import__("collections").defaultdict}
    extract(source.read_text(), ["generate_log2phy_map"], space)
    cases = []
    for seed, (ranks, experts, width, tensor_parallel) in enumerate(
        [(8, 16, 3, 1), (8, 12, 3, 2), (6, 5, 3, 3), (4, 9, 4, 4)]
    ):
        rng = np.random.default_rng(300 + seed)
        layout = distinct_slots(rng, experts, ranks, width)
        maps = torch.full((ranks, experts), -1, dtype=torch.int32)
        for rank in range(ranks):
            for place in range(width):
                maps[rank, layout[rank * width + place]] = place
        chosen = [
            space["generate_log2phy_map"](list(maps), rank, tp_size=tensor_parallel).tolist()
            for rank in range(ranks)
        ]
        cases.append({
            "experts": experts, "ranks": ranks, "tensor_parallel": tensor_parallel,
            "slots": layout, "chosen": chosen,
        })
    return {"engine": "vllm-ascend 182b75e", "function": "generate_log2phy_map", "cases": cases}


def distinct_slots(rng: np.random.Generator, experts: int, ranks: int, width: int) -> list[int]:
    """[S] as `random_slots`, no expert twice on a rank (this engine's maps cannot say it)."""
    while True:
        layout = np.array(random_slots(rng, experts, ranks * width)).reshape(ranks, width)
        if all(len(set(row)) == width for row in layout.tolist()):
            return [int(e) for e in layout.reshape(-1)]
        rows = [rng.permutation(experts)[:width] for _ in range(ranks)]
        if len(np.unique(np.concatenate(rows))) == experts:
            return [int(e) for e in np.concatenate(rows)]


class BooleanMasks:
    """Triton's interpreter, whose atomics refuse a mask that comes of comparing scalars: int32."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def atomic_rmw(self, op: Any, pointer: Any, value: Any, mask: Any, order: Any) -> Any:
        return self.inner.atomic_rmw(op, pointer, value, mask.astype(bool), order)


# ---- taking functions out of sources --------------------------------------------------------


def take(
    wheel: Path, path: str, names: list[str], space: dict[str, Any], *, annotations: bool = True
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        extract(archive.read(path).decode(), names, space, annotations=annotations)


def extract(
    source: str, names: list[str], space: dict[str, Any], *, annotations: bool = True
) -> None:
    """Define the named functions of a source in `space`; kernels want a file to be read from."""
    found = {
        node.name: node for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name in names
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise SystemExit(f"no function {missing[0]} in this source: another version of the engine?")
    lines = source.splitlines(keepends=True)
    text = "from __future__ import annotations\n" if not annotations else ""
    for name in names:
        node = found[name]
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        text += textwrap.dedent("".join(lines[first : node.end_lineno])) + "\n\n"
    path = Path(tempfile.gettempdir()) / f"engine_{names[0]}.py"
    path.write_text(text)
    exec(compile(text, str(path), "exec"), space)


def version(wheel: Path) -> str:
    name, number = wheel.name.split("-")[:2]
    return f"{name} {number}"


def _compact(recorded: dict[str, Any]) -> str:
    """JSON with one case a line."""
    parts = []
    for policy, found in recorded.items():
        lines = [json.dumps(case, separators=(",", ":")) for case in found["cases"]]
        cases = ",\n".join("  " + line for line in lines)
        parts.append(
            f' "{policy}": {{"engine": "{found["engine"]}", "function": "{found["function"]}", '
            f'"cases": [\n{cases}\n ]}}'
        )
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
