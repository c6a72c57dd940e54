"""The demo's traffic: prompts of mixed domains, then of domains that shift.

Knows domains and prompt lengths. Knows nothing of plans, ranks or measurements.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..reference.prompts import DOMAINS, demo_prompts

PROMPT_TOKENS = 384

# Far apart for the reference model's router (see its README): code and English, then the East.
SHIFT = (("code", "english"), ("russian", "japanese", "chinese"))


@dataclass(frozen=True)
class DemoTraffic:
    """Prompts in the order they are sent, and the domain of each."""

    prompts: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.prompts))

    def head(self, count: int) -> DemoTraffic:
        """The first prompts only."""
        return DemoTraffic(self.prompts[:count], self.domains[:count])

    def parts(self, count: int) -> list[DemoTraffic]:
        """As many stretches of about equal length, in order."""
        cuts = [len(self.prompts) * i // count for i in range(count + 1)]
        return [
            DemoTraffic(self.prompts[a:b], self.domains[a:b]) for a, b in itertools.pairwise(cuts)
        ]


def mixed(tokens: int, seed: int) -> DemoTraffic:
    """All domains in turn, about `tokens` in all."""
    return _interleaved(DOMAINS, tokens, seed)


def mixed_then_shifting(tokens: int, seed: int) -> DemoTraffic:
    """A third of all domains in turn, a third of some, a third of others."""
    phases = (DOMAINS, *SHIFT)
    parts = [_interleaved(names, tokens // 3, seed + i) for i, names in enumerate(phases)]
    return DemoTraffic(
        tuple(p for part in parts for p in part.prompts),
        tuple(d for part in parts for d in part.domains),
    )


def _interleaved(domains: tuple[str, ...], tokens: int, seed: int) -> DemoTraffic:
    each = max(1, round(tokens / PROMPT_TOKENS / len(domains)))
    lists = [demo_prompts(d, each, PROMPT_TOKENS, seed) for d in domains]
    return DemoTraffic(
        tuple(tuple(prompts[i]) for i in range(each) for prompts in lists),
        tuple(d for _ in range(each) for d in domains),
    )
