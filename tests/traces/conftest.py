"""Small inputs that the trace tests share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.trace import RoutingTrace

MakeTrace = Callable[..., RoutingTrace]


def _choices(
    rng: np.random.Generator, tokens: int, layers: int, experts: int, k: int
) -> npt.NDArray[np.int64]:
    """[T, L, K] without an expert twice; low experts are likelier."""
    score = rng.gumbel(size=(tokens, layers, experts)) - np.log(np.arange(experts) + 1.0)
    return np.argsort(-score, axis=2, kind="stable")[:, :, :k]


@pytest.fixture
def make_trace() -> MakeTrace:
    """make_trace(tokens=…, layers=…, experts=…, top_k=…, seed=…, full=…): all columns or none."""

    def make(
        tokens: int = 200, layers: int = 3, experts: int = 8, top_k: int = 2, seed: int = 0,
        full: bool = True,
    ) -> RoutingTrace:
        rng = np.random.default_rng(seed)
        ids = _choices(rng, tokens, layers, experts, top_k)
        if not full:
            return RoutingTrace.from_arrays(ids, num_experts=experts)
        return RoutingTrace.from_arrays(
            ids, num_experts=experts, gates=rng.random(ids.shape),
            k_of_token=rng.integers(1, top_k + 1, (tokens, layers)),
            step=np.arange(tokens) // 16, request=np.arange(tokens) // 10,
            source=rng.integers(0, 4, tokens), phase=rng.integers(0, 2, tokens),
            domain=rng.integers(0, 2, tokens), domain_names=("chat", "code"),
            layer_indices=range(1, layers + 1), model_name="small",
        )

    return make


@pytest.fixture
def spec() -> ModelSpec:
    """Three MoE layers of eight experts, two chosen."""
    return ModelSpec(name="small", num_layers=3, num_experts=8, top_k=2)
