"""A cache of experts on one device, for models that do not fit: hits, misses and stalls.

Weights live in a slower tier (host memory or disk). In every step each layer runs its active
experts in rising order; one that is not resident is loaded first, over one link, one at a time.
Knows steps, policies and the link. Knows nothing of other devices or of requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ...errors import UsageError
from ...foundation.arrays import IntArray
from ...placement.cluster import Cluster
from ...traces.model_spec import ModelSpec
from ...traces.steps import Steps
from ...traces.trace import RoutingTrace
from .policies import Eviction, make_policy
from .predictors import Predictor


@dataclass(frozen=True)
class CacheTier:
    """Room and link of the cache.

    slots: resident experts, per layer, or in all layers together with `shared` (ExpertFlow's
    cross-layer slots; with the policy "cross_layer" a layer that has run gives its slots to those
    still to come). load_us: of one expert, from the tier to the device.
    """

    slots: int
    load_us: float
    shared: bool = False

    def __post_init__(self) -> None:
        if self.slots < 1 or not (np.isfinite(self.load_us) and self.load_us >= 0):
            raise UsageError(
                f"cache: slots {self.slots} must be >= 1, load_us {self.load_us} finite and >= 0"
            )

    @classmethod
    def of(
        cls, slots: int, model: ModelSpec, cluster: Cluster,
        *, tier: Literal["host", "disk"] = "host", disk_bytes_per_s: float = 3e9,
        shared: bool = False,
    ) -> CacheTier:
        """From sizes and rates: the host link of the cluster's hardware, or a disk before it."""
        rate = cluster.hardware.host_to_device_bytes_per_s
        if tier == "disk":
            rate = min(rate, disk_bytes_per_s)
        elif tier != "host":
            raise UsageError(f"unknown cache tier {tier!r}: host or disk")
        return cls(slots, float(model.bytes_per_expert_E().max()) / rate * 1e6, shared)


@dataclass(frozen=True)
class CacheResult:
    """Totals of a run. prefetched: hits that a prediction brought in; wasted: loads never used."""

    policy: str
    accesses: int
    hits: int
    prefetched: int
    loads: int
    wasted: int
    stall_us: float
    compute_us: float
    steps: int
    hit_rate_L: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def hit_rate(self) -> float:
        """Accesses that found the expert resident (or on its way) over all."""
        return self.hits / self.accesses

    @property
    def step_us(self) -> float:
        """Mean time of a step's experts, stalls included."""
        return (self.compute_us + self.stall_us) / self.steps

    def to_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return vars(self) | {"hit_rate": self.hit_rate, "step_us": self.step_us}


def play_cache(
    trace: RoutingTrace,
    steps: Steps,
    tier: CacheTier,
    *,
    policy: str = "lru",
    predictor: Predictor | None = None,
    expert_us: float = 0.0,
    token_us: float = 0.0,
) -> CacheResult:
    """Run all steps through the cache.

    expert_us, token_us: compute of an active expert and of each of its tokens. The cache starts
    empty. With a predictor, the next layer's experts are loaded while the link is free; loads of
    missing experts go first. Raises UsageError on an unknown policy.
    """
    run = _Run(trace, tier, make_policy(policy, _accesses(trace, steps)), expert_us, token_us)
    for w in range(len(steps)):
        tokens = steps.tokens_of(w)
        for layer in range(trace.num_layers):
            run.layer(tokens, layer)
            if predictor is not None and layer + 1 < trace.num_layers:
                run.prefetch(predictor.predict(tokens, layer + 1), layer + 1)
    return run.result(policy, len(steps))


@dataclass(eq=False)
class _Run:
    trace: RoutingTrace
    tier: CacheTier
    policy: Eviction
    expert_us: float
    token_us: float
    clock: float = 0.0                  # of the compute
    link: float = 0.0                   # when the link is free
    turn: int = -1
    ready: dict[int, float] = field(default_factory=dict)      # resident expert -> loaded at
    busy_until: dict[int, float] = field(default_factory=dict)  # expert -> its last run's end
    brought: set[int] = field(default_factory=set)             # prefetched, not used yet
    used: set[int] = field(default_factory=set)                # used since loaded
    hits: int = 0
    prefetched: int = 0
    loads: int = 0
    wasted: int = 0
    stall: float = 0.0
    compute: float = 0.0

    def __post_init__(self) -> None:
        self.hits_L = np.zeros(self.trace.num_layers)
        self.accesses_L = np.zeros(self.trace.num_layers)

    def layer(self, tokens: IntArray, layer: int) -> None:
        """Run one layer's active experts in rising order."""
        counts_E = _counts(self.trace, tokens, layer)
        base = layer * self.trace.num_experts
        active = (base + np.flatnonzero(counts_E)).tolist()
        active_set = set(active)
        start = self.clock
        self.link = max(self.link, start)    # loads of this layer are known from here on
        own = 0.0
        for expert in active:
            self.turn += 1
            self.accesses_L[layer] += 1
            if expert in self.ready:
                self.hits += 1
                self.hits_L[layer] += 1
                self.prefetched += expert in self.brought
            else:
                self._load(expert, active_set, self.link)
            self.brought.discard(expert)
            self.used.add(expert)
            self.policy.used(expert, self.turn)
            took = self.expert_us + self.token_us * float(counts_E[expert - base])
            self.clock = max(self.clock, self.ready[expert]) + took
            self.busy_until[expert] = self.clock
            own += took
        self.compute += own
        self.stall += self.clock - start - own

    def prefetch(self, experts: list[int], layer: int) -> None:
        """Load what is predicted, as long as the link is free before the layer has to start."""
        base = layer * self.trace.num_experts
        wanted = [base + e for e in experts][: self.tier.slots]
        keep = set(wanted)
        layer_start = self.clock
        for expert in wanted:
            if expert in self.ready:
                continue
            if self.link >= layer_start:
                break    # the layer starts: what is really missing goes first
            if all(e in keep for e in self._peers(expert)) and self._full(expert):
                break
            self._load(expert, keep, self.link)
            self.brought.add(expert)

    def _load(self, expert: int, active: set[int], earliest: float) -> None:
        start = earliest
        if self._full(expert):
            victim = self.policy.victim(self._peers(expert), active)
            # Its slot is free once the victim has run and, if still on its way, has come.
            start = max(start, self.busy_until.get(victim, 0.0), self.ready[victim])
            self._drop(victim)
        self.link = start + self.tier.load_us
        self.ready[expert] = self.link
        self.loads += 1
        self.used.discard(expert)
        self.policy.loaded(expert, self.turn)

    def _drop(self, expert: int) -> None:
        del self.ready[expert]
        self.brought.discard(expert)
        self.wasted += expert not in self.used

    def _peers(self, expert: int) -> list[int]:
        """Resident experts that share the slots this one may use."""
        if self.tier.shared:
            return list(self.ready)
        layer = expert // self.trace.num_experts
        return [e for e in self.ready if e // self.trace.num_experts == layer]

    def _full(self, expert: int) -> bool:
        return len(self._peers(expert)) >= self.tier.slots

    def result(self, policy: str, steps: int) -> CacheResult:
        rates = self.hits_L / np.maximum(self.accesses_L, 1)
        return CacheResult(
            policy, int(self.accesses_L.sum()), self.hits, self.prefetched, self.loads,
            self.wasted, self.stall, self.compute, steps, tuple(rates.tolist()),
        )


def _counts(trace: RoutingTrace, tokens: IntArray, layer: int) -> IntArray:
    """[E] tokens of each expert in one step and layer."""
    chosen = trace.ids[tokens, layer]
    if trace.k_of_token is not None:
        chosen = chosen[np.arange(trace.top_k) < trace.k_of_token[tokens, layer][:, None]]
    return np.bincount(chosen.reshape(-1), minlength=trace.num_experts)


def _accesses(trace: RoutingTrace, steps: Steps) -> Iterator[int]:
    """Every access of the run in order: what Belady must know."""
    for w in range(len(steps)):
        tokens = steps.tokens_of(w)
        for layer in range(trace.num_layers):
            base = layer * trace.num_experts
            for expert in np.flatnonzero(_counts(trace, tokens, layer)).tolist():
                yield base + expert
