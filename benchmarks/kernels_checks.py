"""Promises of the kernels that are kept or broken, not timed: bits, errors, machine code.

Knows how to draw plans, splits and odd shapes; `kernels.py` prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from oracles.expert_layer import expert_layer, relative_error
from rank_layer import rank_layer
from torch import Tensor

from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.cpu.packed import packed_available
from loadmaster.kernels.cpu.panel_matrix import panels_available
from loadmaster.kernels.grouped import ExpertWeights, grouped_experts
from loadmaster.kernels.routing import combine_rows, sort_by_slot

EXACT_CASES = 240
SILU = ExpertActivation("silu")
# (hidden, intermediate): odd sizes, and widths at which single rows take other code.
EXACT_SIZES = ((64, 48), (129, 33), (512, 256), (2048, 96), (96, 2048))


def exact() -> dict[str, Any]:
    """One process with every expert once, against random plans on several ranks and sub-batches."""
    broken = [case for case in range(EXACT_CASES) if not _same_bits(case)]
    return {"exact": not broken, "cases": EXACT_CASES, "broken": broken, "holds": not broken}


def _same_bits(case: int) -> bool:
    """One case: random experts, batch, plan, home ranks and quotas, then a random sub-batch."""
    g = torch.Generator().manual_seed(case)
    hidden, intermediate = EXACT_SIZES[case % len(EXACT_SIZES)]
    num_experts, ranks, spare = _draw(g, 1, 12), _draw(g, 1, 4), _draw(g, 0, 6)
    tokens, choices = _draw(g, 1, 64), _draw(g, 1, num_experts)
    experts = _experts(num_experts, hidden, intermediate, torch.bfloat16, g)
    x = torch.randn(tokens, hidden, generator=g).bfloat16()
    ids = torch.rand(tokens, num_experts, generator=g).argsort(1)[:, :choices]
    gate = torch.rand(tokens, choices, generator=g)
    alone = _weights(experts, range(num_experts), torch.bfloat16)
    whole = rank_layer(x, ids, gate, alone)

    slots = -(-(num_experts + spare) // ranks) * ranks
    extra = torch.randint(num_experts, (slots - num_experts,), generator=g)
    plan = torch.cat((torch.arange(num_experts), extra))[torch.randperm(slots, generator=g)]
    home = torch.randint(ranks, (tokens,), generator=g)
    slot = torch.full_like(ids, -1)
    for rank in range(ranks):
        mine = home == rank
        if mine.any():
            slot[mine] = _slots_of(ids[mine], plan, g)
    order, count, row = sort_by_slot(slot, slots)
    y = torch.empty(len(order), hidden, dtype=torch.bfloat16)
    start = 0
    for shard, counts in zip(plan.view(ranks, -1), count.view(ranks, -1), strict=True):
        stop = start + int(counts.sum())
        weights = _weights(experts, shard.tolist(), torch.bfloat16)
        rows = x[order[start:stop] // choices]
        y[start:stop] = grouped_experts(rows, counts, weights)
        start = stop
    keep = torch.rand(tokens, generator=g) < 0.4
    part = rank_layer(x[keep], ids[keep], gate[keep], alone)
    return torch.equal(combine_rows(y, row, gate), whole) and torch.equal(part, whole[keep])


def _slots_of(ids: Tensor, plan: Tensor, g: torch.Generator) -> Tensor:
    """Every assignment draws one of its expert's slots, as any dispatch policy may."""
    slot = torch.empty_like(ids)
    for at, expert in enumerate(ids.flatten().tolist()):
        slots = (plan == expert).nonzero().flatten()
        slot.view(-1)[at] = slots[_draw(g, 0, len(slots) - 1)]
    return slot


def oracle() -> dict[str, Any]:
    """The worst relative error against float64 of every backend, and the shape it fell on."""
    worst: dict[str, Any] = {}
    for backend in ("panels", "packed", "torch"):
        for label, dtype, limit in (("fp32", torch.float32, 1e-6), ("bf16", torch.bfloat16, 1e-2)):
            available = {"panels": panels_available, "packed": packed_available}
            if not available.get(backend, bool)(dtype):
                continue
            errors = {
                name: relative_error(out, expected)
                for name, out, expected in _oracle_cases(backend, dtype)
            }
            name = max(errors, key=errors.__getitem__)
            finite = all(error == error for error in errors.values())
            worst[f"{backend}_{label}"] = {
                "worst": errors[name], "at": name, "shapes": len(errors), "target": limit,
                "holds": finite and errors[name] <= limit,
            }
    worst["holds"] = all(entry["holds"] for entry in worst.values())
    return worst


def _oracle_cases(backend: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, output and float64 reference over the shape list of the kernel reference."""
    shapes = [
        (t, e, k, h, i)
        for t in (0, 1, 2, 15, 16, 17, 37, 64, 65)
        for e, k in ((3, 1), (7, 3), (12, 12))
        for h, i in ((17, 33), (47, 97))
    ]
    shapes += [(65, 257, 3, 33, 17), (37, 1, 1, 64, 32), (16, 12, 1, 1, 1)]
    for tokens, num_experts, choices, hidden, intermediate in shapes:
        g = torch.Generator().manual_seed(tokens + num_experts + hidden)
        experts = _experts(num_experts, hidden, intermediate, dtype, g)
        weights = _weights(experts, range(num_experts), dtype, backend)
        x = torch.randn(tokens, hidden, generator=g).to(dtype)
        ids = torch.rand(tokens, num_experts, generator=g).argsort(1)[:, :choices]
        gate = torch.rand(tokens, choices, generator=g)
        name = f"T{tokens} E{num_experts} K{choices} H{hidden} I{intermediate}"
        for variant, x_given, ids_given in _variants(x, ids):
            out = rank_layer(x_given, ids_given, gate, weights)
            expected = expert_layer(x_given, ids_given, gate, experts, SILU)
            yield f"{name} {variant}", out, expected


def _variants(x: Tensor, ids: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Plain; strided rows at an odd address; one hot expert; nothing here (another rank's)."""
    yield "plain", x, ids
    wide = torch.zeros(len(x) + 1, x.shape[1] + 1, dtype=x.dtype)[1:, 1:]
    yield "strided", wide.copy_(x), ids
    if ids.shape[1] == 1:
        yield "hot", x, torch.zeros_like(ids)
        yield "empty rank", x, torch.full_like(ids, -1)


def sm90() -> dict[str, Any]:
    """Every kernel's machine code for Hopper, in a process where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernels_compile.py"))],
        env=environment, capture_output=True, text=True, check=False,
    )
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [build for build in builds if build["faults"]]
    found = {"builds": builds, "count": len(builds), "wrong": wrong}
    if done.returncode and not wrong:
        found["error"] = done.stderr[-2000:]
    return found | {"holds": done.returncode == 0}


def _experts(
    num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype, g: torch.Generator
) -> list[dict[str, Tensor]]:
    return [
        {
            "gate_up": (
                torch.randn(2 * intermediate, hidden, generator=g) * hidden**-0.5
            ).to(dtype),
            "down": (torch.randn(hidden, intermediate, generator=g) * intermediate**-0.5).to(dtype),
        }
        for _ in range(num_experts)
    ]


def _weights(
    experts: Sequence[dict[str, Tensor]],
    placed: Sequence[int],
    dtype: torch.dtype,
    backend: str = "auto",
) -> ExpertWeights:
    hidden, intermediate = experts[0]["down"].shape
    weights = ExpertWeights.allocate(
        len(placed), hidden, intermediate,
        dtype=dtype, device="cpu", activation=SILU, backend=backend,
    )
    for slot, expert in enumerate(placed):
        weights.load_slot(slot, experts[expert])
    return weights


def _draw(g: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=g))
