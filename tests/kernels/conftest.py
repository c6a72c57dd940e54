"""Small random expert layers, and what every kernel test needs of them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.oracles.expert_layer import expert_layer, expert_rows
from loadmaster.kernels.activation import ExpertActivation
from loadmaster.kernels.cpu.packed import packed_available
from loadmaster.kernels.cpu.panel_matrix import panels_available
from loadmaster.kernels.grouped import ExpertWeights

torch.set_num_threads(1)

SILU = ExpertActivation("silu")


@dataclass(frozen=True)
class Layer:
    """The experts of one layer, as a model stores them."""

    experts: list[dict[str, Tensor]]
    activation: ExpertActivation

    @property
    def dtype(self) -> torch.dtype:
        return self.experts[0]["down"].dtype

    def weights(
        self, backend: str = "auto", expert_of_slot: list[int] | None = None
    ) -> ExpertWeights:
        """The layer's weights on the CPU; expert_of_slot places experts, -1 leaves a slot empty."""
        if backend == "panels" and not panels_available(self.dtype):
            pytest.skip(f"this processor multiplies no panels of {self.dtype}")
        if backend == "packed" and not packed_available(self.dtype):
            pytest.skip(f"oneDNN packs no {self.dtype} on this processor")
        placed = list(range(len(self.experts))) if expert_of_slot is None else expert_of_slot
        hidden, intermediate = self.experts[0]["down"].shape
        weights = ExpertWeights.allocate(
            len(placed),
            hidden,
            intermediate,
            dtype=self.dtype,
            device="cpu",
            activation=self.activation,
            bias="down_bias" in self.experts[0],
            backend=backend,
        )
        for slot, expert in enumerate(placed):
            if expert >= 0:
                weights.load_slot(slot, self.experts[expert])
        return weights

    def oracle(self, x_TH: Tensor, ids_TK: Tensor, gate_TK: Tensor) -> Tensor:
        return expert_layer(x_TH, ids_TK, gate_TK, self.experts, self.activation)

    def oracle_rows(self, x_AH: Tensor, expert_A: list[int]) -> Tensor:
        return expert_rows(x_AH, expert_A, self.experts, self.activation)


def build_layer(
    num_experts: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype = torch.float32,
    activation: ExpertActivation = SILU,
    bias: bool = False,
    seed: int = 0,
) -> Layer:
    """Experts with outputs of order one, so that absolute and relative errors agree."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    experts = []
    for _ in range(num_experts):
        expert = {
            "gate_up": normal(2 * intermediate, hidden, scale=hidden**-0.5),
            "down": normal(hidden, intermediate, scale=intermediate**-0.5),
        }
        if bias:
            expert["gate_up_bias"] = normal(2 * intermediate, scale=0.5)
            expert["down_bias"] = normal(hidden, scale=0.5)
        experts.append(expert)
    return Layer(experts, activation)


def draw_ids(tokens: int, choices: int, num_experts: int, seed: int = 0) -> Tensor:
    """ids_TK without repeats in a row."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_experts, generator=generator)[:choices] for _ in range(tokens)]
    return torch.stack(rows) if rows else torch.empty(0, choices, dtype=torch.int64)


def draw_rows(tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, hidden, generator=generator).to(dtype)


def draw_gates(tokens: int, choices: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(tokens, choices, generator=generator), dim=1)


@pytest.fixture(scope="session")
def layer_of() -> Callable[..., Layer]:
    return build_layer


@pytest.fixture(scope="session")
def ids_of() -> Callable[..., Tensor]:
    return draw_ids


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., Tensor]:
    return draw_rows


@pytest.fixture(scope="session")
def gates_of() -> Callable[..., Tensor]:
    return draw_gates
