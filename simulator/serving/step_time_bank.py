"""A step timer that draws from steps routed beforehand, for runs of many steps.

A step's time depends on how many prompt and answer tokens it holds, on how many of the prompt
tokens start from one rank (its port is the busiest), and on which tokens they are. For a grid of
those three sizes the bank routes a few steps of each, drawn from the workload's own requests; a
batch's time is interpolated (linearly) between the sizes around it. The grid is filled as sizes
occur. `benchmarks/simulator.py` measures the error against routing every step.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from ...errors import UsageError
from ...foundation.arrays import FloatArray, IntArray
from ..pricing.attribution import Usage
from ..pricing.step_composition import Composition
from ..pricing.step_router import Condition, RoutedSteps, StepRouter
from ..random_streams import stream
from .active_state import ActiveState
from .batching import Batch
from .event_loop import ServingGroup
from .token_source import TokenSource
from .workload import Workload

KEPT_STEPS = 48
# Share of a step's prompt tokens that the busiest home rank holds.
SHARES = (0.0, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
Key = tuple[int, int, int, int, int]    # condition, window, answers, prompts, place in SHARES


@dataclass(frozen=True)
class BankSpec:
    """How finely steps are prepared.

    samples: routed steps per size. ratio: neighbouring sizes differ by this factor. windows: parts
    of the workload, by arrival, drawn apart (their mixes of domains may differ).
    """

    samples: int = 8
    ratio: float = 1.25
    windows: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1 or self.windows < 1 or not 1.01 <= self.ratio <= 4:
            raise UsageError(
                f"bank: samples {self.samples} and windows {self.windows} must be >= 1, ratio "
                f"{self.ratio} in 1.01..4"
            )


@dataclass(eq=False)
class _Cell:
    routed: RoutedSteps
    step_us: list[float]
    exchange_us: list[float]
    used: FloatArray       # [samples] how often each was drawn


class StepBank:
    """Times of steps by size. Grows as sizes, conditions and windows occur."""

    def __init__(
        self, router: StepRouter, source: TokenSource, workload: Workload, active: ActiveState,
        *, largest: int, seed: int, spec: BankSpec = BankSpec(), other_us_per_token: float = 0.0,
    ) -> None:
        self.router, self.source, self.active = router, source, active
        self.workload, self.spec, self.seed = workload, spec, seed
        self.other_us_per_token = other_us_per_token
        self.sizes = grid(largest, spec.ratio)
        self.cells: dict[Key, _Cell] = {}
        self._draws = stream(seed, "steps")
        self._drawn: list[int] = []
        self._last_sample = 0
        self._first: list[tuple[Key, int]] = []
        self._jitter_us = self._own_us = 0.0    # in addition to the cells' own times
        requests = len(workload)
        self.window_start = [requests * i // spec.windows for i in range(spec.windows)]
        self.window_ns = [int(workload.arrival_ns[r]) for r in self.window_start]

    @property
    def follows_traffic(self) -> bool:
        """Whether steps hold what requests of their time read, where the mix of domains drifts."""
        return self.workload.domain is None or self.spec.windows > 1

    # ---- one step ---------------------------------------------------------------------------

    def step_ns(self, batch: Batch, group: ServingGroup) -> int:
        """Nanoseconds of the batch, at least 1."""
        self.active.require_cover(group.index)
        sample = self._sample()
        step_us, heaviest, nearest_key = 0.0, -1.0, (0, 0, 0, 0, 0)
        number = self.active.number_of_group[group.index]
        for key, part in self._corners(batch, group, number):
            cell = self._cell(key)
            cell.used[sample] += part
            step_us += part * cell.step_us[sample]
            if part > heaviest:
                heaviest, nearest_key = part, key
        nearest = self.cells[nearest_key]
        if len(self._first) < KEPT_STEPS:
            self._first.append((nearest_key, sample))
        self.active.exchange_us_of_group[group.index] += nearest.exchange_us[sample]
        jitter_us = self.active.jitter_us(nearest.routed.compute_us[sample])
        own_us = self._outside_us(batch)
        self._jitter_us += jitter_us
        self._own_us += own_us
        return max(1, round((step_us + jitter_us + own_us) * 1e3))

    def again_us(self, batch: Batch, group: ServingGroup, condition: Condition) -> float:
        """What the batch priced last would take in another condition: the same draw, no jitter."""
        number = self.active.number_of(condition)
        return self._outside_us(batch) + sum(
            part * self._cell(key).step_us[self._last_sample]
            for key, part in self._corners(batch, group, number)
        )

    def _outside_us(self, batch: Batch) -> float:
        """Attention and dense layers, in addition to what the router prices."""
        return self.other_us_per_token * batch.tokens / self.router.cluster.num_devices

    def _corners(
        self, batch: Batch, group: ServingGroup, number: int
    ) -> list[tuple[Key, float]]:
        """The prepared sizes around a batch in a condition, with parts that sum to 1."""
        window = max(0, bisect_right(self.window_ns, group.loop.env.now) - 1)
        shares = _around_share(_busiest_share(batch, group)) if batch.chunks else [(0, 1.0)]
        return [
            ((number, window, answers, prompts, share), part_a * part_p * part_s)
            for answers, part_a in self._around(batch.decode_tokens)
            for prompts, part_p in self._around(batch.prefill_tokens)
            for share, part_s in shares
        ]

    def _around(self, tokens: int) -> list[tuple[int, float]]:
        """The prepared sizes on both sides and their parts; 0 stands alone."""
        at = bisect_right(self.sizes, tokens) - 1
        low = self.sizes[at]
        if low == tokens or at + 1 == len(self.sizes):
            return [(low, 1.0)]
        high = self.sizes[at + 1]
        part = (tokens - low) / (high - low)
        return [(low, 1.0 - part), (high, part)]

    def _sample(self) -> int:
        if not self._drawn:
            self._drawn = self._draws.integers(0, self.spec.samples, 4096).tolist()
        self._last_sample = self._drawn.pop()
        return self._last_sample

    # ---- filling ----------------------------------------------------------------------------

    def _cell(self, key: Key) -> _Cell:
        cell = self.cells.get(key)
        if cell is None:
            routed = self.router.cost(self._compositions(key), self.active.conditions[key[0]])
            exchange_us = (routed.dispatch_us + routed.combine_us).sum(axis=1)
            cell = _Cell(routed, routed.step_us.tolist(), exchange_us.tolist(),
                         np.zeros(self.spec.samples))
            self.cells[key] = cell
        return cell

    def _compositions(self, key: Key) -> list[Composition]:
        """The cell's steps; they depend on window, sizes and seed, not on plan or order of use."""
        number, window, answers, prompts, share = key
        lost = self.active.conditions[number].lost
        alive = np.array([g for g in range(self.router.cluster.num_devices) if g not in lost])
        rng = stream(self.seed, f"bank {answers} {prompts} {share}", window)
        first = self.window_start[window]
        later = self.window_start[window + 1 : window + 2]
        pool = np.arange(first, later[0] if later else len(self.workload))
        return [
            self._compose(rng, pool, alive, answers, prompts, SHARES[share])
            for _ in range(self.spec.samples)
        ]

    def _compose(
        self, rng: np.random.Generator, pool: IntArray, alive: IntArray, answers: int,
        prompts: int, share: float,
    ) -> Composition:
        """Answers of requests met in proportion to their length; whole prompts, one per home."""
        devices = len(alive)
        homes_G = rng.permutation(alive)
        tokens, homes = [], []
        if answers:
            length = self.workload.output_tokens[pool]
            requests = rng.choice(pool, answers, p=length / length.sum())
            written = (rng.random(answers) * self.workload.output_tokens[requests]).astype(np.int64)
            tokens.append(self.source.answers(requests, written))
            homes.append(homes_G[np.arange(answers) % devices])
        largest = max(1, round(share * prompts), -(-prompts // devices))
        left, home = prompts, 0
        while left > 0:
            request = int(rng.choice(pool))
            wanted = largest if home == 0 else int(self.workload.prompt_tokens[request])
            count = min(left, largest, wanted)
            if left - count > largest * (devices - home - 1):
                count = min(left, largest)     # smaller ones would not leave enough homes
            tokens.append(self.source.prompt(request, 0, count))
            homes.append(np.full(count, homes_G[home]))
            left -= count
            home += 1
        return Composition(np.concatenate(tokens), np.concatenate(homes))

    def first_steps(self) -> list[Composition]:
        """Steps like the first ones, for a timeline."""
        return [self._compositions(key)[sample] for key, sample in self._first]

    # ---- the account ------------------------------------------------------------------------

    def account(self) -> tuple[Usage, list[Composition], Condition]:
        """Everything that ran; steps to judge the waits on; the condition they ran in.

        Judged on the sizes that took most time under the first condition, one sample of each.
        """
        usage = Usage(self.router.model.num_layers, self.router.cluster.num_devices)
        for key in sorted(self.cells):
            usage.add(self.cells[key].routed, self.cells[key].used)
        usage.add_beside(self._jitter_us, self._own_us)
        first = [(float(c.used @ c.routed.step_us), k) for k, c in self.cells.items()
                 if k[0] == 0 and c.used.any()]
        heaviest = sorted(first, key=lambda row: (-row[0], row[1]))[:KEPT_STEPS]
        kept = [self._compositions(key)[0] for _, key in heaviest]
        return usage, kept, self.active.conditions[0]


def grid(largest: int, ratio: float) -> list[int]:
    """0, 1, 2, ... growing by `ratio`, ending at `largest`."""
    sizes = [0, 1]
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, round(sizes[-1] * ratio))))
    return sizes


def _busiest_share(batch: Batch, group: ServingGroup) -> float:
    """The largest part of a batch's prompt tokens that starts from one rank; 1 where none do."""
    if len(batch.chunks) < 2:
        return 1.0
    home, by_home = group.loop.requests.home, dict[int, int]()
    for chunk in batch.chunks:
        rank = home[chunk.prefill.request]
        by_home[rank] = by_home.get(rank, 0) + chunk.tokens
    return max(by_home.values()) / batch.prefill_tokens


def _around_share(share: float) -> list[tuple[int, float]]:
    at = bisect_right(SHARES, share) - 1
    if SHARES[at] == share:
        return [(at, 1.0)]
    part = (share - SHARES[at]) / (SHARES[at + 1] - SHARES[at])
    return [(at, 1.0 - part), (at + 1, part)]
