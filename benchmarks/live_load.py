"""Continuous load on a group, prompts of known continuation, and plans to switch to.

Shared by the sections of `live.py`. Every answer is compared with the one an undisturbed group
gave, so a wrong token anywhere is counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loadmaster.placement.plan import Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.workers.group.group import Group
from loadmaster.workers.reference.prompts import DOMAINS, demo_prompts

STEP_TOKENS = 4096


def text_prompts(count: int, tokens: int, seed: int = 0) -> tuple[list[list[int]], list[str]]:
    """Prompts of all domains in turn, and their domains."""
    each = -(-count // len(DOMAINS))
    lists = [demo_prompts(d, each, tokens, seed) for d in DOMAINS]
    prompts = [list(ps[i]) for i in range(each) for ps in lists][:count]
    return prompts, [d for _ in range(each) for d in DOMAINS][:count]


def random_prompts(count: int, tokens: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Prompts of noise, for models that were never trained."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocabulary, (count, tokens)).tolist()


def random_plan(spec: ModelSpec, ranks: int, seed: int, spare: int = 2) -> Plan:
    """Experts at random over the ranks, `spare` replicas on each."""
    rng = np.random.default_rng(seed)
    base = -(-spec.num_experts // ranks)
    slots = np.full((spec.num_layers, ranks, base + spare), -1, np.int16)
    for layer in range(spec.num_layers):
        for rank, part in enumerate(np.array_split(rng.permutation(spec.num_experts), ranks)):
            others = np.setdiff1d(np.arange(spec.num_experts), part)
            row = np.concatenate((part, rng.choice(others, spare, replace=False)))
            slots[layer, rank, : len(row)] = row
    return Plan(slots=slots, num_experts=spec.num_experts)


def swapped_plan(plan: Plan, share: float, seed: int) -> Plan:
    """The plan with a share of each layer's experts swapped between ranks."""
    rng = np.random.default_rng(seed)
    slots = plan.slots.copy()
    ranks = plan.num_devices
    for layer_GC in slots:
        for _ in range(max(1, round(share * plan.num_experts / 2))):
            a, b = rng.choice(ranks, 2, replace=False)
            only_a = np.flatnonzero(~np.isin(layer_GC[a], layer_GC[b]) & (layer_GC[a] >= 0))
            only_b = np.flatnonzero(~np.isin(layer_GC[b], layer_GC[a]) & (layer_GC[b] >= 0))
            if len(only_a) and len(only_b):
                i, j = rng.choice(only_a), rng.choice(only_b)
                layer_GC[a, i], layer_GC[b, j] = layer_GC[b, j], layer_GC[a, i]
    return Plan(slots=slots, num_experts=plan.num_experts, dispatch=plan.dispatch)


@dataclass
class Tally:
    """What became of the requests of a load."""

    answered: int = 0
    wrong: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Requests were answered, all of them, and rightly."""
        return self.answered > 0 and self.wrong == 0 and self.failed == 0

    def to_dict(self) -> dict[str, Any]:
        return {"answered": self.answered, "wrong": self.wrong, "failed": self.failed,
                "errors": self.errors[:3]}


class Load:
    """Sends the same prompts again and again, from a thread, until told to stop.

    Two batches are always on their way, so that prompts never run out while answers are fetched.
    """

    def __init__(
        self, group: Group, prompts: Sequence[Sequence[int]], new_tokens: int, want: list[list[int]]
    ) -> None:
        self._group, self._new_tokens = group, new_tokens
        half = len(prompts) // 2
        self._parts = [(prompts[:half], want[:half]), (prompts[half:], want[half:])]
        self.tally = Tally()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=part) for part in self._parts]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, prompts: Sequence[Sequence[int]], want: list[list[int]]) -> None:
        while not self._stop.is_set():
            try:
                got = self._group.generate(prompts, self._new_tokens)
            except Exception as error:      # whatever it is, these requests were not answered
                self.tally.failed += len(prompts)
                self.tally.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(0.5)
                continue
            self.tally.answered += len(got)
            self.tally.wrong += sum(a != b for a, b in zip(got, want, strict=True))
