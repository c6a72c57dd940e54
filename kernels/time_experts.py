"""How long experts take here: tokens per expert x active experts, small steps and large.

Times `grouped_experts` on random weights that are cold, as a layer finds them: more layers are
filled than a cache holds and every run takes the next one. CPU time of this process on a CPU, event
time on a GPU. Machines change their speed from second to second (clocks, neighbours): every sample
is taken relative to a reference run before and after it, and medians are reported. Knows nothing of
plans, traces or fits: `simulator/calibrate/machine_profile.py` turns the rows into a profile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from .activation import ExpertActivation
from .grouped import ExpertWeights, grouped_experts

TOKENS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ACTIVE_EXPERTS = (1, 4, 16)
REFERENCE_TOKENS = 64
# A step is decode-like while reading an expert's weights outweighs multiplying with them.
DECODE_TOKENS = 16
# Enough weights that none is still in cache when its turn comes again.
COLD_BYTES = 128 << 20
SILU = ExpertActivation("silu")


@dataclass(frozen=True)
class ExpertTiming:
    """One measured point: `active_experts` experts with `tokens_per_expert` tokens each."""

    tokens_per_expert: int
    active_experts: int
    phase: str  # "decode" or "prefill"
    dtype: str
    hidden: int
    intermediate: int
    backend: str
    device: str
    cpu_us: float  # CPU time on a CPU, event time on a GPU
    repeats: int


def time_experts(
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    activation: ExpertActivation = SILU,
    tokens_per_expert: Sequence[int] = TOKENS_PER_EXPERT,
    active_experts: Sequence[int] = ACTIVE_EXPERTS,
    repeats: int = 7,
    seed: int = 0,
) -> list[ExpertTiming]:
    """Measure every combination; one row each, in the order given.

    Sets nothing: call `torch.set_num_threads(1)` first, as the workers do. Takes about
    repeats x (the measured times and a reference run beside each), and COLD_BYTES of memory or two
    layers, whichever is more.
    """
    if repeats < 1:
        raise InputError(f"{repeats} repeats: time at least once")
    runs = expert_runs(
        hidden, intermediate, dtype=dtype, device=device, backend=backend,
        activation=activation, tokens_per_expert=tokens_per_expert,
        active_experts=active_experts, seed=seed,
    )
    us = steady_medians_us(runs.once_us, runs.reference_us, repeats)
    return [
        ExpertTiming(
            tokens_per_expert=tokens,
            active_experts=active,
            phase="decode" if tokens <= DECODE_TOKENS else "prefill",
            dtype=str(dtype).removeprefix("torch."),
            hidden=hidden,
            intermediate=intermediate,
            backend=runs.backend,
            device=str(torch.device(device)),
            cpu_us=us[tokens, active],
            repeats=repeats,
        )
        for tokens, active in runs.once_us
    ]


@dataclass(frozen=True)
class ExpertRuns:
    """(tokens per expert, active experts) -> run it once on cold experts, and how long it took.

    reference_us: a run of middling size, the same every time.
    """

    once_us: dict[tuple[int, int], Callable[[], float]]
    reference_us: Callable[[], float]
    backend: str


def expert_runs(
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    activation: ExpertActivation = SILU,
    tokens_per_expert: Sequence[int] = TOKENS_PER_EXPERT,
    active_experts: Sequence[int] = ACTIVE_EXPERTS,
    seed: int = 0,
) -> ExpertRuns:
    """What `time_experts` samples, for whoever interleaves it with timings of their own.

    Every run takes the next cold experts, whichever point it is of.
    """
    if min(*tokens_per_expert, *active_experts) < 1:
        raise InputError("tokens per expert and active experts must all be >= 1")
    slots = max(active_experts)
    layers = cold_layers(
        hidden, intermediate, dtype, torch.device(device), backend, activation,
        slots=slots, seed=seed,
    )
    most = max(tokens_per_expert) * slots
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(most, hidden, generator=generator).to(dtype).to(layers[0].shape.device)
    order = itertools.cycle(itertools.product(range(0, slots, min(active_experts)), layers))

    def once_us(tokens: int, active: int) -> float:
        first, weights = next(order)
        chosen = [(first + i) % slots for i in range(active)]
        return _time_once(x[: tokens * active], tokens, chosen, weights)

    return ExpertRuns(
        {point: partial(once_us, *point)
         for point in itertools.product(tokens_per_expert, active_experts)},
        partial(once_us, min(REFERENCE_TOKENS, max(tokens_per_expert)), min(active_experts)),
        layers[0].backend,
    )


Point = TypeVar("Point")


def steady_medians_us(
    runs: Mapping[Point, Callable[[], float]], reference_us: Callable[[], float], repeats: int
) -> dict[Point, float]:
    """Median of every run, as if the machine kept the speed it mostly had.

    Rounds of all runs, after one to warm up; each sample is divided by the mean of the reference
    before and after it, and medians are scaled back by the reference's own.
    """
    shares: dict[Point, list[float]] = {point: [] for point in runs}
    references: list[float] = []
    for repeat in range(repeats + 1):
        before = reference_us()
        for point, once_us in runs.items():
            us, after = once_us(), reference_us()
            if repeat:
                shares[point].append(us / ((before + after) / 2))
                references.append(after)
            before = after
    usual_us = median(references)
    return {point: median(values) * usual_us for point, values in shares.items()}


def cold_layers(
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    activation: ExpertActivation,
    *,
    slots: int,
    seed: int,
) -> list[ExpertWeights]:
    """Layers of `slots` random experts each, COLD_BYTES of them and at least two.

    Not one layer of very many: a call's cost before its first expert grows with the slots.
    """
    layer_bytes = 3 * hidden * intermediate * dtype.itemsize * slots
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(max(2, -(-COLD_BYTES // layer_bytes))):
        weights = ExpertWeights.allocate(
            slots, hidden, intermediate, dtype=dtype, device=device, activation=activation,
            backend=backend,
        )
        for slot in range(slots):
            gate_up = torch.randn(2 * intermediate, hidden, generator=generator) * hidden**-0.5
            down = torch.randn(hidden, intermediate, generator=generator) * intermediate**-0.5
            weights.set_slot(slot, gate_up.to(dtype), down.to(dtype))
        layers.append(weights)
    return layers


def microseconds(device: torch.device, run: Callable[[], object]) -> float:
    """One run: CPU time of this process, or event time on a GPU (which this waits for)."""
    if device.type != "cuda":
        start_ns = time.process_time_ns()
        run()
        return (time.process_time_ns() - start_ns) / 1e3
    event: Any = torch.cuda.Event
    before, after = event(enable_timing=True), event(enable_timing=True)
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device)
    return float(before.elapsed_time(after)) * 1e3


def _time_once(x_AH: Tensor, tokens: int, slots: Sequence[int], weights: ExpertWeights) -> float:
    count_S = torch.zeros(weights.shape.slots, dtype=torch.int64)
    count_S[list(slots)] = tokens
    out = torch.empty_like(x_AH)
    return microseconds(
        weights.shape.device, lambda: grouped_experts(x_AH, count_S, weights, out=out)
    )
