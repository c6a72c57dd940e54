"""Experts in slots: what goes in comes out, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loadmaster.errors import InputError
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.grouped import ExpertWeights, grouped_experts
from loadmaster.kernels.weights import with_index

Maker = Callable[..., Any]

BACKENDS = ["torch", "packed", "panels"]
GPT_OSS = ExpertActivation("gptoss_clamped", limit=7.0, alpha=1.702, interleaved=True)


def _same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(got) == list(expected) and all(torch.equal(got[n], expected[n]) for n in got)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (17, 33), (64, 32), (96, 100)])
@pytest.mark.parametrize("activation", [ExpertActivation("silu"), GPT_OSS], ids=["silu", "gptoss"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_slot_gives_back_the_bits_it_got(
    backend: str,
    dtype: torch.dtype,
    hidden: int,
    intermediate: int,
    activation: ExpertActivation,
    bias: bool,
    layer_of: Maker,
) -> None:
    layer = layer_of(3, hidden, intermediate, dtype, activation, bias)
    weights = layer.weights(backend)
    for slot, expert in enumerate(layer.experts):
        assert _same(weights.get_slot(slot), expert)
        total = sum(tensor.numel() * tensor.element_size() for tensor in expert.values())
        assert weights.bytes_per_slot == total


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_keeps_nothing_of_the_callers_tensors(backend: str, layer_of: Maker) -> None:
    layer = layer_of(1, 16, 8, torch.float32, GPT_OSS, True)
    weights = layer.weights(backend)
    before = weights.get_slot(0)
    for tensor in (*layer.experts[0].values(), *weights.get_slot(0).values()):
        tensor.fill_(7.0)
    assert _same(weights.get_slot(0), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_not_filled_yet_are_zero(backend: str, layer_of: Maker) -> None:
    weights = layer_of(2, 16, 8).weights(backend, [-1, 1])
    assert all((tensor == 0).all() for tensor in weights.get_slot(0).values())
    y = grouped_experts(torch.ones(3, 16), torch.tensor([3, 0]), weights)
    assert (y == 0).all()


def test_refuses_experts_that_do_not_fit(layer_of: Maker) -> None:
    layer = layer_of(2, 16, 8, torch.float32, GPT_OSS, True)
    weights, expert = layer.weights(), layer.experts[0]
    with pytest.raises(InputError, match="slot 2 is past the table of 2 slots"):
        weights.load_slot(2, expert)
    with pytest.raises(InputError, match="slot -1 is past the table"):
        weights.get_slot(-1)
    with pytest.raises(InputError, match="needs exactly gate_up, down, gate_up_bias, down_bias"):
        weights.set_slot(0, expert["gate_up"], expert["down"])
    with pytest.raises(InputError, match=r"down for slot 0 is \(8, 16\)"):
        weights.load_slot(0, {**expert, "down": expert["down"].T})
    with pytest.raises(InputError, match=r"must be .* torch\.float32"):
        weights.load_slot(0, {**expert, "down": expert["down"].bfloat16()})


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors name their GPU with its number; "cuda" alone would equal none of them."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda:3")
    assert with_index(torch.device("cuda:1")) == torch.device("cuda:1")
    assert with_index(torch.device("cpu:0")) == torch.zeros(0).device


def test_no_slot_is_left_half_changed_by_a_refused_expert(layer_of: Maker) -> None:
    layer = layer_of(1, 16, 8)
    weights: ExpertWeights = layer.weights()
    with pytest.raises(InputError, match="needs exactly"):
        weights.load_slot(0, {"gate_up": torch.zeros(16, 16)})
    assert _same(weights.get_slot(0), layer.experts[0])
