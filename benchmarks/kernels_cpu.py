"""Timings of the CPU expert layer beside what it is compared with, in one run.

Knows how to build a layer, its comparators and its routing; `kernels.py` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rank_layer import choose_experts, rank_layer
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.cpu.packed import pack, packed_available, packed_linear
from loadmaster.kernels.grouped import ExpertWeights
from loadmaster.kernels.routing import combine_rows, sort_by_slot
from loadmaster.kernels.time_experts import microseconds

CPU = torch.device("cpu")
DENSE_BLOCK_ROWS = 2048
FAR = 5.0


@dataclass(frozen=True)
class Shape:
    """One benchmark layer."""

    tokens: int
    experts: int
    choices: int
    hidden: int
    intermediate: int


PREFILL = Shape(2048, 64, 8, 1024, 512)
DECODE = Shape(32, 64, 8, 1024, 512)
MIXTRAL = Shape(512, 8, 2, 1024, 2048)


class Layer:
    """The same random experts for us, for transformers and for the dense comparison."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        generator = torch.Generator().manual_seed(0)
        config = MixtralConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.choices,
        )
        config._experts_implementation = "grouped_mm"
        self.transformers = MixtralExperts(config).to(dtype).requires_grad_(False)
        for parameter in self.transformers.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        self.weights = ExpertWeights.allocate(
            shape.experts, shape.hidden, shape.intermediate,
            dtype=dtype, device=CPU, activation=ExpertActivation("silu"),
        )
        gate_up, down = self.transformers.gate_up_proj, self.transformers.down_proj
        for expert in range(shape.experts):
            self.weights.set_slot(expert, gate_up[expert], down[expert])
        rows = shape.tokens * shape.choices
        self.x = torch.randn(shape.tokens, shape.hidden, generator=generator).to(dtype)
        # Where oneDNN packs no bfloat16, its float32 products are the fastest dense ones there are.
        self.dense_dtype = dtype if packed_available(dtype) else torch.float32
        self.dense_x, self.dense_act = (
            torch.randn(rows, width, generator=generator).to(self.dense_dtype)
            for width in (shape.hidden, shape.intermediate)
        )
        self.dense_up, self.dense_down = (
            pack(matrix[0].to(self.dense_dtype)) for matrix in (gate_up, down)
        )

    def logits(self, distribution: str) -> Tensor:
        """Router logits: uniform, or experts chosen by Zipf's law with exponent 1."""
        generator = torch.Generator().manual_seed(1)
        draws = torch.rand(self.shape.tokens, self.shape.experts, generator=generator)
        noise = -torch.log(-torch.log(draws.clamp(1e-9, 1 - 1e-7)))
        if distribution == "uniform":
            return noise
        return noise - torch.log(torch.arange(1, self.shape.experts + 1))

    def run(self, distribution: str) -> Callable[[], Tensor]:
        gate, ids = choose_experts(self.logits(distribution), self.shape.choices)
        return lambda: rank_layer(self.x, ids, gate, self.weights)

    def run_transformers(self, distribution: str) -> Callable[[], Tensor]:
        gate, ids = choose_experts(self.logits(distribution), self.shape.choices)
        typed = gate.to(self.dtype)
        return lambda: self.transformers(self.x, ids, typed)

    def run_dense(self, block_rows: int) -> Callable[[], None]:
        """Both products of one expert over all T * K rows, block_rows at a time."""

        def run() -> None:
            for start in range(0, len(self.dense_x), block_rows):
                packed_linear(self.dense_x[start : start + block_rows], self.dense_up, None)
                packed_linear(self.dense_act[start : start + block_rows], self.dense_down, None)

        return run


def medians_ms(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU milliseconds of each, interleaved, after one warm-up round.

    What takes more than FAR times the first one is sampled three times only: no bar is so far.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    first = samples[next(iter(runs))]
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            mine = samples[name]
            if len(mine) >= 3 and min(mine) > FAR * max(first):
                continue
            us = microseconds(CPU, run)
            if repeat:
                mine.append(us / 1e3)
    return {name: median(values) for name, values in samples.items()}


def cpu() -> dict[str, Any]:
    """prefill, decode and mixtral, each in bfloat16 and float32."""
    result: dict[str, Any] = {}
    for name, shape in (("prefill", PREFILL), ("decode", DECODE), ("mixtral", MIXTRAL)):
        result[name] = {
            label: _compare(name, Layer(shape, dtype))
            for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
    result["holds"] = all(
        result[name][label]["holds"] for name in ("prefill", "decode", "mixtral")
        for label in ("bf16", "fp32")
    )
    return result


def _compare(name: str, layer: Layer) -> dict[str, Any]:
    rows = len(layer.dense_x)
    runs: dict[str, Callable[[], object]] = {
        "layer": layer.run("uniform"),
        "layer_skewed": layer.run("zipf"),
        "transformers_grouped_mm": layer.run_transformers("uniform"),
        "dense": layer.run_dense(rows),
        "dense_blocked": layer.run_dense(DENSE_BLOCK_ROWS),
    }
    theirs, ours = runs["transformers_grouped_mm"](), runs["layer"]()
    assert isinstance(theirs, Tensor) and isinstance(ours, Tensor)
    difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    ms = medians_ms(runs, repeats=9 if name != "decode" else 31)
    of_dense = ms["dense"] / ms["layer"]
    speedup = ms["transformers_grouped_mm"] / ms["layer"]
    skew = ms["layer_skewed"] / ms["layer"]
    bf16 = layer.dtype == torch.bfloat16
    holds = {
        "prefill": of_dense >= (0.85 if bf16 else 0.90) and speedup >= 1.3 and skew <= 1.10,
        "decode": speedup >= 1.6,
        "mixtral": of_dense >= 0.90,
    }[name]
    return {
        "ms": {key: round(value, 3) for key, value in ms.items()},
        "of_dense": round(of_dense, 4),
        "of_dense_blocked": round(ms["dense_blocked"] / ms["layer"], 4),
        "speedup_over_transformers_grouped_mm": round(speedup, 3),
        "skewed_over_uniform": round(skew, 4),
        "difference_from_transformers": difference,
        "backend": layer.weights.backend,
        "dense_dtype": str(layer.dense_dtype),
        "target": {
            "prefill": f"of_dense >= {0.85 if bf16 else 0.9}, speedup >= 1.3, skewed <= 1.10",
            "decode": "speedup >= 1.6",
            "mixtral": "of_dense >= 0.90",
        }[name],
        "holds": holds,
    }


def routing_share() -> dict[str, Any]:
    """Sort and combine over the layer with them, at prefill in bfloat16."""
    layer, shape = Layer(PREFILL, torch.bfloat16), PREFILL
    gate, ids = choose_experts(layer.logits("uniform"), shape.choices)
    order, _, row = sort_by_slot(ids, shape.experts)
    y = torch.randn(len(order), shape.hidden).to(layer.dtype)
    ms = medians_ms(
        {
            "layer": layer.run("uniform"),
            "sort": lambda: sort_by_slot(ids, shape.experts),
            "combine": lambda: combine_rows(y, row, gate),
        },
        repeats=9,
    )
    share = (ms["sort"] + ms["combine"]) / ms["layer"]
    return {
        "share": round(share, 4),
        "ms": {key: round(value, 3) for key, value in ms.items()},
        "target": "share <= 0.10",
        "holds": share <= 0.10,
    }
