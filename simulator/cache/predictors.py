"""Which experts the next layer will want, guessed before it is reached.

Conditional frequency (EdgeMoE): how often each expert of layer l + 1 followed each one of layer l
in a profile. Look-ahead (Fate): the next gate evaluated early; needs ids that a recorder predicted,
or replaces them at a stated accuracy. Knows routing. Knows nothing of caches or time.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import InputError, UsageError
from ...foundation.arrays import IntArray
from ...traces.trace import RoutingTrace
from ..random_streams import stream


class Predictor(Protocol):
    """Experts of `layer` that these tokens will choose, likeliest first."""

    def predict(self, tokens: IntArray, layer: int) -> list[int]: ...


class ConditionalFrequency:
    """Expected tokens of each expert given the tokens' choices one layer before.

    Learnt from `profile`; answers for tokens of `trace`. Experts expected to get less than
    `least` tokens are not named. Nothing is known of layer 0.
    """

    def __init__(self, profile: RoutingTrace, trace: RoutingTrace, *, least: float = 0.5) -> None:
        if profile.ids.shape[1:] != trace.ids.shape[1:]:
            raise InputError(
                f"the profile has {profile.ids.shape[1:]} layers and choices, the trace "
                f"{trace.ids.shape[1:]}"
            )
        self.trace, self.least = trace, least
        experts = trace.num_experts
        self.follows_LEE = np.empty((trace.num_layers - 1, experts, experts))
        for layer in range(trace.num_layers - 1):
            before = np.repeat(profile.ids[:, layer].astype(np.int64), profile.top_k, axis=1)
            after = np.tile(profile.ids[:, layer + 1].astype(np.int64), (1, profile.top_k))
            pairs = np.bincount((before * experts + after).reshape(-1), minlength=experts**2)
            counts = pairs.reshape(experts, experts).astype(np.float64)
            chosen = np.bincount(profile.ids[:, layer].reshape(-1), minlength=experts)
            # Each token of expert e votes once for each of its next choices, shared by its own K.
            self.follows_LEE[layer] = counts / np.maximum(chosen, 1)[:, None] / profile.top_k

    def predict(self, tokens: IntArray, layer: int) -> list[int]:
        if layer == 0:
            return []
        chosen = self.trace.ids[tokens, layer - 1].reshape(-1)
        counts_E = np.bincount(chosen, minlength=self.trace.num_experts)
        expected_E = counts_E @ self.follows_LEE[layer - 1]
        order = np.argsort(-expected_E, kind="stable")
        return [int(e) for e in order if expected_E[e] >= self.least]


class LookAhead:
    """The next layer's gate on this layer's input.

    predicted [T, L, K]: ids a recorder noted early. Layer 0 cannot be looked ahead to.
    """

    def __init__(self, predicted: npt.NDArray[np.integer[npt.NBitBase]], num_experts: int) -> None:
        if predicted.ndim != 3:
            raise InputError(f"predicted ids must be [T, L, K]; got {list(predicted.shape)}")
        self.predicted, self.num_experts = predicted, num_experts

    @classmethod
    def with_accuracy(cls, trace: RoutingTrace, accuracy: float, *, seed: int = 0) -> LookAhead:
        """A stand-in: true ids, each wrong with probability 1 - accuracy (a random expert then).

        Traces do not hold gate inputs, so the accuracy is a premise, not a finding.
        """
        if not 0 <= accuracy <= 1:
            raise UsageError(f"accuracy {accuracy} must lie in [0, 1]")
        rng = stream(seed, "look-ahead")
        wrong = rng.random(trace.ids.shape) >= accuracy
        guess = rng.integers(0, trace.num_experts, trace.ids.shape)
        return cls(np.where(wrong, guess, trace.ids), trace.num_experts)

    def predict(self, tokens: IntArray, layer: int) -> list[int]:
        if layer == 0:
            return []
        counts_E = np.bincount(
            self.predicted[tokens, layer].reshape(-1), minlength=self.num_experts
        )
        order = np.argsort(-counts_E, kind="stable")
        return [int(e) for e in order if counts_E[e] > 0]
