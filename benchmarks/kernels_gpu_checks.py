"""Whether the Triton kernels are right on this device, before anything is timed.

Against float64 on small shapes, bit for bit between plans, splits and batch sizes, NaN. Knows no
times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracles.expert_layer import expert_layer, relative_error
from rank_layer import choose_experts, rank_layer
from torch import Tensor

from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.grouped import ExpertWeights, grouped_experts

SILU = ExpertActivation("silu")
GPT_OSS = ExpertActivation("gptoss_clamped", limit=0.8, alpha=1.702, interleaved=True)


class Case:
    """Random experts on the device, and the same ones for the oracle."""

    def __init__(
        self,
        device: torch.device,
        experts: int,
        hidden: int,
        intermediate: int,
        dtype: torch.dtype = torch.bfloat16,
        activation: ExpertActivation = SILU,
        bias: bool = False,
    ) -> None:
        self.device, self.dtype, self.activation = device, dtype, activation
        self.generator = torch.Generator().manual_seed(experts + hidden)
        self.experts = []
        for _ in range(experts):
            expert = {
                "gate_up": self.draw(2 * intermediate, hidden) * hidden**-0.5,
                "down": self.draw(hidden, intermediate) * intermediate**-0.5,
            }
            if bias:
                expert["gate_up_bias"] = self.draw(2 * intermediate)
                expert["down_bias"] = self.draw(hidden)
            self.experts.append({name: tensor.to(dtype) for name, tensor in expert.items()})

    def draw(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator)

    def rows(self, tokens: int) -> Tensor:
        hidden = self.experts[0]["down"].shape[0]
        return self.draw(tokens, hidden).to(self.dtype).to(self.device)

    def logits(self, tokens: int) -> Tensor:
        return self.draw(tokens, len(self.experts)).to(self.device)

    def weights(self, placed: list[int] | None = None) -> ExpertWeights:
        placed = list(range(len(self.experts))) if placed is None else placed
        hidden, intermediate = self.experts[0]["down"].shape
        weights = ExpertWeights.allocate(
            len(placed), hidden, intermediate,
            dtype=self.dtype, device=self.device, activation=self.activation,
            bias="down_bias" in self.experts[0], backend="triton",
        )
        for slot, expert in enumerate(placed):
            weights.load_slot(slot, self.experts[expert])
        return weights

    def oracle(self, x: Tensor, ids: Tensor, gate: Tensor) -> Tensor:
        return expert_layer(x.cpu(), ids.cpu(), gate.cpu(), self.experts, self.activation)


def check_all(device: torch.device) -> dict[str, dict[str, Any]]:
    """Every check by name, with its figures and whether it holds."""
    checks: dict[str, Callable[[torch.device], dict[str, Any]]] = {
        "oracle": check_oracle,
        "plans": check_plans,
        "batches": check_batches,
        "nan": check_nan,
    }
    return {name: check(device) for name, check in checks.items()}


def check_oracle(device: torch.device) -> dict[str, Any]:
    """Odd and even sizes, every activation, both dtypes."""
    real = device.type == "cuda"
    errors: dict[str, float] = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        sizes = [(3, 17, 33), (16, 64, 32)] + ([(12, 2048, 768), (257, 33, 17)] if real else [])
        for experts, hidden, intermediate in sizes:
            case = Case(device, experts, hidden, intermediate, dtype)
            for tokens in (1, 15, 17) + ((65,) if real else ()):
                x, logits = case.rows(tokens), case.logits(tokens)
                gate, ids = choose_experts(logits, min(3, experts))
                out = rank_layer(x, ids, gate, case.weights())
                at = f"{name} E{experts} H{hidden} I{intermediate} T{tokens}"
                errors[at] = relative_error(out.cpu(), case.oracle(x, ids, gate))
    for kind in ("gelu", "gelu_tanh", "relu", "gptoss_clamped"):
        activation = GPT_OSS if kind == "gptoss_clamped" else ExpertActivation(kind)
        case = Case(device, 4, 40, 24, torch.float32, activation, bias=True)
        x, logits = case.rows(9), case.logits(9)
        gate, ids = choose_experts(logits, 2)
        out = rank_layer(x, ids, gate, case.weights())
        errors[f"fp32 {kind} bias"] = relative_error(out.cpu(), case.oracle(x, ids, gate))
    # The interpreter cuts bits off where it should round them.
    limits = {"fp32": 1e-6, "bf16": 1e-2 if real else 2e-2}
    worst = {
        name: max(e for at, e in errors.items() if at.startswith(name)) for name in limits
    }
    finite = all(error == error for error in errors.values())
    holds = finite and all(worst[name] <= limits[name] for name in limits)
    return {"worst": worst, "limits": limits, "cases": len(errors), "holds": holds}


def check_plans(device: torch.device) -> dict[str, Any]:
    """Any plan and any dispatch give the bits of every expert standing once."""
    experts, tokens = (16, 500) if device.type == "cuda" else (5, 30)
    case = Case(device, experts, 256 if device.type == "cuda" else 32, 64)
    x, logits = case.rows(tokens), case.logits(tokens)
    gate, ids = choose_experts(logits, 2)
    whole = rank_layer(x, ids, gate, case.weights())
    equal = []
    for seed in range(20 if device.type == "cuda" else 2):
        g = torch.Generator().manual_seed(seed)
        extra = torch.randint(experts, (6,), generator=g)
        plan = torch.cat((torch.arange(experts), extra))[torch.randperm(experts + 6, generator=g)]
        slot = torch.empty_like(ids).cpu()
        for expert in range(experts):
            slots, mine = (plan == expert).nonzero().flatten(), ids.cpu() == expert
            slot[mine] = slots[torch.randint(len(slots), (int(mine.sum()),), generator=g)]
        out = rank_layer(x, slot, gate, case.weights(plan.tolist()))
        equal.append(torch.equal(out, whole))
    return {"plans": len(equal), "equal": sum(equal), "holds": all(equal)}


def check_batches(device: torch.device) -> dict[str, Any]:
    """A row's bits, whatever the batch and so whatever the block sizes."""
    hidden, intermediate = (2048, 768) if device.type == "cuda" else (32, 16)
    case, rows = Case(device, 1, hidden, intermediate), 1000 if device.type == "cuda" else 150
    weights, x = case.weights(), case.rows(rows)
    whole = grouped_experts(x, torch.tensor([rows]), weights)
    sizes = [size for size in (1, 2, 7, 16, 17, 33, 64, 65, 100, 129, 500) if size < rows]
    broken = [
        size
        for size in sizes
        if not torch.equal(
            grouped_experts(x[3 : 3 + size], torch.tensor([size]), weights), whole[3 : 3 + size]
        )
    ]
    repeats = all(
        torch.equal(grouped_experts(x, torch.tensor([rows]), weights), whole) for _ in range(5)
    )
    return {"sizes": sizes, "broken": broken, "repeats": repeats, "holds": not broken and repeats}


def check_nan(device: torch.device) -> dict[str, Any]:
    """NaN in a token stays in that token."""
    case = Case(device, 4, 64, 32)
    x, logits = case.rows(30), case.logits(30)
    weights = case.weights()
    gate, ids = choose_experts(logits, 2)
    clean = rank_layer(x, ids, gate, weights)
    x[7, 3] = float("nan")
    out = rank_layer(x, ids, gate, weights)
    others = torch.arange(30, device=device) != 7
    holds = bool(out[7].isnan().all()) and torch.equal(out[others], clean[others])
    return {"holds": holds}
