"""A step timer that routes every batch from the very tokens its requests read. Exact and slow."""

from __future__ import annotations

import numpy as np

from ..pricing.attribution import Usage
from ..pricing.step_composition import Composition
from ..pricing.step_router import Condition, StepRouter
from .active_state import ActiveState
from .batching import Batch
from .event_loop import ServingGroup
from .token_source import TokenSource

KEPT_STEPS = 48


class EveryStep:
    """Prices each step by itself, and remembers the first ones for the blame."""

    follows_traffic = True

    def __init__(
        self, router: StepRouter, source: TokenSource, active: ActiveState,
        *, other_us_per_token: float = 0.0,
    ) -> None:
        self.router, self.source, self.active = router, source, active
        self.other_us_per_token = other_us_per_token
        self.usage = Usage(router.model.num_layers, router.cluster.num_devices)
        self.kept: list[Composition] = []

    def step_ns(self, batch: Batch, group: ServingGroup) -> int:
        """Nanoseconds of the batch, at least 1."""
        composition = self.compose(batch, group)
        if len(self.kept) < KEPT_STEPS:
            self.kept.append(composition)
        self.active.require_cover(group.index)
        routed = self.router.cost([composition], self.active.of(group.index))
        self.usage.add(routed, np.ones(1))
        exchange_us = routed.dispatch_us[0].sum() + routed.combine_us[0].sum()
        self.active.exchange_us_of_group[group.index] += float(exchange_us)
        own_us = self._outside_us(batch)
        jitter_us = self.active.jitter_us(routed.compute_us[0])
        self.usage.add_beside(jitter_us, own_us)
        return max(1, round((float(routed.step_us[0]) + jitter_us + own_us) * 1e3))

    def again_us(self, batch: Batch, group: ServingGroup, condition: Condition) -> float:
        """What the batch priced last would take in another condition, without jitter."""
        routed = self.router.cost([self.compose(batch, group)], condition)
        return float(routed.step_us[0]) + self._outside_us(batch)

    def _outside_us(self, batch: Batch) -> float:
        """Attention and dense layers, in addition to what the router prices."""
        return self.other_us_per_token * batch.tokens / self.router.cluster.num_devices

    def compose(self, batch: Batch, group: ServingGroup) -> Composition:
        """The tokens of the batch and their home ranks."""
        home = group.loop.requests.home
        tokens, homes = [], []
        for chunk in batch.chunks:
            request = chunk.prefill.request
            tokens.append(self.source.prompt(request, chunk.start, chunk.tokens))
            homes.append(np.full(chunk.tokens, home[request]))
        if batch.decode_tokens:
            decoding = np.array(group.lanes.written(), np.int64)
            tokens.append(self.source.answers(decoding[:, 0], decoding[:, 1]))
            homes.append(np.array([home[r] for r in decoding[:, 0].tolist()]))
        return Composition(np.concatenate(tokens), np.concatenate(homes))

    def first_steps(self) -> list[Composition]:
        """What the first steps held, for a timeline."""
        return self.kept

    def account(self) -> tuple[Usage, list[Composition], Condition]:
        """Everything that ran; steps to judge the waits on; the condition they ran in."""
        return self.usage, self.kept, self.active.conditions[0]
