"""The layers that `kernels_gpu.py` times: ours, torch's grouped product, transformers' own.

Knows how to build and run them on weight sets that rotate; knows no targets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels_gpu_shapes import Shape, median_us
from oracles.expert_layer import relative_error
from rank_layer import choose_experts, count_tokens, rank_layer
from torch import Tensor
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.grouped import ExpertWeights

# Three sets of this layer's weights are far larger than the 50 MB L2 cache.
WEIGHT_SETS = 3
# Copies one weight matrix per assignment: beyond this it only measures memory running out.
BATCHED_MM_TOKENS = 16


class Layers:
    """The same random weights for everyone, WEIGHT_SETS times over."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        config = MixtralConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.choices,
        )
        self.theirs, self.ours = [], []
        for seed in range(WEIGHT_SETS if device.type == "cuda" else 1):
            torch.manual_seed(seed)
            module: Any = MixtralExperts(config).to(device).bfloat16().requires_grad_(False)
            weights = ExpertWeights.allocate(
                shape.experts, shape.hidden, shape.intermediate,
                dtype=torch.bfloat16, device=device, activation=ExpertActivation("silu"),
                backend="triton",
            )
            for parameter in module.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            for expert in range(shape.experts):
                weights.set_slot(expert, module.gate_up_proj[expert], module.down_proj[expert])
            self.theirs.append(module)
            self.ours.append(weights)

    def time(self, tokens: int, logits: Tensor, kind: str) -> dict[str, Any]:
        """Everyone's median, after ours was found right beside transformers' eager layer."""
        shape = self.shape
        x = torch.randn(tokens, shape.hidden, device=self.device).bfloat16()
        gate, ids = choose_experts(logits, shape.choices)
        out = rank_layer(x, ids, gate, self.ours[0])
        expected = self._run_transformers("eager", x, ids, gate)[0]()
        error = relative_error(out, expected)
        if not error <= 2e-2:
            raise SystemExit(f"{tokens} tokens, {kind}: off by {error} from transformers' eager")
        us = {
            "layer": median_us(self.device, self._run_ours(x, ids, gate)),
            "transformers_grouped_mm": self._median("grouped_mm", x, ids, gate),
            "transformers_eager": self._median("eager", x, ids, gate),
            "grouped_mm_products": median_us(self.device, self._run_products(x, ids)),
        }
        if tokens <= BATCHED_MM_TOKENS:
            us["transformers_batched_mm"] = self._median("batched_mm", x, ids, gate)
        count = count_tokens(ids, shape.experts)
        return {
            "tokens": tokens,
            "kind": kind,
            "active_experts": int((count > 0).sum()),
            "most_tokens_on_one_expert": int(count.max()),
            "difference_from_eager": error,
            "us": us,
            "over_grouped_mm": us["transformers_grouped_mm"] / us["layer"],
        }

    def _run_ours(self, x: Tensor, ids: Tensor, gate: Tensor) -> list[Callable[[], object]]:
        return [
            lambda weights=weights: rank_layer(x, ids, gate, weights) for weights in self.ours
        ]

    def _median(self, implementation: str, x: Tensor, ids: Tensor, gate: Tensor) -> float:
        return median_us(self.device, self._run_transformers(implementation, x, ids, gate))

    def _run_transformers(
        self, implementation: str, x: Tensor, ids: Tensor, gate: Tensor
    ) -> list[Callable[[], Tensor]]:
        typed = gate.to(x.dtype)
        runs = []
        for module in self.theirs:
            configured = copy.copy(module)
            configured.config = copy.copy(module.config)
            configured.config._experts_implementation = implementation
            runs.append(lambda configured=configured: configured(x, ids.long(), typed))
        return runs

    def _run_products(self, x: Tensor, ids: Tensor) -> list[Callable[[], object]]:
        """torch's grouped products alone: rows already gathered, offsets already known."""
        order = torch.argsort(ids.flatten().long(), stable=True)
        rows = x[order // self.shape.choices]
        offsets = count_tokens(ids, self.shape.experts).cumsum(0).to(self.device, torch.int32)

        def run(module: Any) -> Tensor:
            gate_up = F.grouped_mm(rows, module.gate_up_proj.transpose(1, 2), offs=offsets)
            gate, up = gate_up.chunk(2, dim=1)
            return F.grouped_mm(F.silu(gate) * up, module.down_proj.transpose(1, 2), offs=offsets)

        return [lambda module=module: run(module) for module in self.theirs]


def draw_logits(
    shape: Shape, tokens: int, kind: str, routing: Path | None, device: torch.device
) -> Tensor:
    """Router logits [T, E] whose top-k falls as asked for."""
    generator = torch.Generator().manual_seed(tokens)
    draws = torch.rand(tokens, shape.experts, generator=generator).clamp(1e-9, 1 - 1e-7)
    noise = -torch.log(-torch.log(draws))
    if kind == "zipf":
        noise -= torch.log(torch.arange(1, shape.experts + 1))
    elif kind == "half_empty":
        noise[:, shape.experts // 2 :] = -100.0
    elif kind == "one_hot":
        noise[:, 0] = 100.0
    elif kind == "recorded":
        assert routing is not None
        ids = torch.from_numpy(_recorded_ids(routing, tokens, shape))
        noise.scatter_add_(1, ids, torch.full(ids.shape, 100.0))
    return noise.to(device)


def _recorded_ids(path: Path, tokens: int, shape: Shape) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The first `tokens` rows of the middle layer, repeated where the recording is shorter."""
    ids = np.load(path)
    ids = ids[:, ids.shape[1] // 2] if ids.ndim == 3 else ids
    if ids.max() >= shape.experts or ids.shape[1] != shape.choices:
        raise SystemExit(
            f"{path}: needs ids below {shape.experts}, {shape.choices} per token; "
            f"got {ids.shape} up to {ids.max()}"
        )
    repeated: np.ndarray[Any, np.dtype[np.int64]] = np.resize(ids, (tokens, ids.shape[1]))
    return repeated.astype(np.int64)
