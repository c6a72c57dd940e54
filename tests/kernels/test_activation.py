"""The gated activations, stored and applied."""

from typing import Any

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from benchmarks.rank_layer import rank_layer
from loadmaster.errors import InputError
from loadmaster.kernels.activation import ExpertActivation, gate_rows_first, stored_rows
from loadmaster.kernels.grouped import ExpertWeights


def test_interleaved_rows_come_apart_and_back_together() -> None:
    clamped = ExpertActivation("gptoss_clamped", limit=7.0, alpha=1.702, interleaved=True)
    rows = torch.arange(12.0).view(6, 2)
    apart = gate_rows_first(rows, clamped)
    assert apart[:, 0].tolist() == [0.0, 4.0, 8.0, 2.0, 6.0, 10.0]
    assert torch.equal(stored_rows(apart, clamped), rows)
    assert gate_rows_first(rows, ExpertActivation("silu")) is rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "swish"}, "'swish' is not known; use one of silu, gelu"),
        ({"kind": "gptoss_clamped", "limit": 7.0}, "needs both limit and alpha"),
        ({"kind": "silu", "alpha": 1.0}, "takes neither limit nor alpha"),
    ],
)
def test_refuses_what_means_nothing(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExpertActivation(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["torch", "packed", "panels"])
def test_gpt_oss_experts_compute_what_transformers_computes(backend: str) -> None:
    """Interleaved rows, both biases, clamps that bite."""
    config = GptOssConfig(hidden_size=48, intermediate_size=40, num_local_experts=5)
    theirs: Any = GptOssExperts(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weights = ExpertWeights.allocate(
        5,
        48,
        40,
        dtype=torch.float32,
        device="cpu",
        activation=ExpertActivation(
            "gptoss_clamped", limit=theirs.limit, alpha=theirs.alpha, interleaved=True
        ),
        bias=True,
        backend=backend,
    )
    for expert in range(5):
        weights.set_slot(
            expert,
            theirs.gate_up_proj[expert].T,
            theirs.down_proj[expert].T,
            theirs.gate_up_proj_bias[expert],
            theirs.down_proj_bias[expert],
        )
    x = torch.randn(30, 48, generator=generator)
    ids = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(30)])
    gate = torch.rand(30, 3, generator=generator)
    with torch.no_grad():
        expected = theirs(x, ids, gate)
    torch.testing.assert_close(rank_layer(x, ids, gate, weights), expected, rtol=1e-4, atol=1e-3)
