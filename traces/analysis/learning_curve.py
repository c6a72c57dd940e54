"""Is a trace long enough? How the worth of a plan grows with the tokens it is made from.

Half of the requests are held back. From the others, n tokens are taken (whole requests in random
order, the last one cut), a plan is judged on the half held back, and n is doubled. What a plan is
worth is for higher floors to say: they hand in a `judge`. Without one, a proxy needs no plan: the
imbalance that remains, on the held-back half, on devices that were exactly balanced by the loads
of the n tokens; what a packing cannot balance even with known loads comes on top. Knows loads.
Knows nothing of plans, clusters or dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import InputError, UsageError
from ..trace import RoutingTrace

Judge = Callable[[RoutingTrace, RoutingTrace], float]
_SMALLEST = 256
_GROUPINGS = 64
_REPEATS = 8             # random halves of the requests, averaged
TOLERANCE = 0.01         # an improvement that does not matter
_DOUBLED = 1 - 1 / np.sqrt(2)      # what twice the tokens take off an error that falls as 1/sqrt


@dataclass(frozen=True)
class LearningCurve:
    """Imbalance on unseen requests against the tokens planned from; smaller is better."""

    tokens: tuple[int, ...]           # planned from, rising; the last is all there are
    imbalance: tuple[float, ...]      # mean over repeats
    spread: tuple[float, ...]         # standard deviation over repeats
    trace_tokens: int                 # what a plan would be made from in the end
    held_out_tokens: int
    tolerance: float
    needed_tokens: int                # from here on a doubling buys less than the tolerance
    judged_by: str

    @property
    def long_enough(self) -> bool:
        """Whether more tokens would change the plan's worth by less than the tolerance."""
        return self.needed_tokens <= self.trace_tokens

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        word = "long enough" if self.long_enough else "too short"
        return (
            f"{word}: it has {self.trace_tokens:,} tokens, a plan needs about "
            f"{self.needed_tokens:,}; with more than that, twice as many tokens improve the "
            f"imbalance on unseen requests by less than {self.tolerance:g} (planned from "
            f"{self.tokens[-1]:,} it is {self.imbalance[-1]:.3f})"
        )


def learning_curve(
    trace: RoutingTrace, *, judge: Judge | None = None, devices: int = 8, seed: int = 0
) -> LearningCurve:
    """Plan from 256, 512, … tokens and judge each time on requests held back.

    judge(plan_from, held_out) -> imbalance >= 1 of a plan made from the first trace on the second.
    Without it, the proxy of this module for `devices` devices with equal numbers of experts.
    A trace without requests is cut in blocks of 256 tokens (optimistic: a request's tokens are
    alike). Raises InputError on a trace too short for two points.
    """
    if devices < 1:
        raise UsageError(f"devices {devices} must be at least 1")
    splits = [_split(trace, seed + r) for r in range(_REPEATS)]
    available = min(len(plan) for plan, _ in splits)
    if available < 2 * _SMALLEST:
        raise InputError(
            f"{trace.num_tokens} tokens are too few for a learning curve: it needs two halves of "
            f"at least {2 * _SMALLEST} tokens in different requests; record more"
        )
    sizes = _doubling(available)
    judged = np.array(
        [[_judge(trace, plan[:n], held, judge, devices, seed) for plan, held in splits]
         for n in sizes]
    )
    mean = judged.mean(axis=1)
    return LearningCurve(
        tokens=tuple(sizes), imbalance=tuple(map(float, mean)), trace_tokens=trace.num_tokens,
        spread=tuple(map(float, judged.std(axis=1))),
        held_out_tokens=round(float(np.mean([len(held) for _, held in splits]))),
        tolerance=TOLERANCE, needed_tokens=_needed(sizes, mean, trace.num_tokens),
        judged_by="the judge handed in" if judge else f"proxy for {devices} devices",
    )


def residual_imbalance(
    planned_LE: npt.ArrayLike, unseen_LE: npt.ArrayLike, devices: int, *, seed: int = 0
) -> float:
    """Max over devices / mean that unseen loads put on devices balanced by the planned loads.

    planned_LE, unseen_LE: [L, E] loads. Experts are dealt to devices at random, in equal numbers
    (the last devices one less where they do not divide); a device's unseen load differs from its
    planned one by the estimation errors of its experts, whichever they are. Mean over layers and
    64 deals. Layers without load on either side are left out; 1 where there is none left.
    """
    planned, unseen = np.asarray(planned_LE, np.float64), np.asarray(unseen_LE, np.float64)
    seen = (planned.sum(axis=1) > 0) & (unseen.sum(axis=1) > 0)
    if not seen.any():
        return 1.0
    planned, unseen = planned[seen], unseen[seen]
    error_LE = unseen / unseen.sum(1, keepdims=True) - planned / planned.sum(1, keepdims=True)
    experts = error_LE.shape[1]
    device_of = np.arange(experts) * min(devices, experts) // experts
    starts = np.searchsorted(device_of, np.arange(min(devices, experts)))
    rng = np.random.default_rng(seed)
    worst = [
        np.add.reduceat(error_LE[:, rng.permutation(experts)], starts, axis=1).max(axis=1).mean()
        for _ in range(_GROUPINGS)
    ]
    return 1.0 + devices * float(np.mean(worst))


def _split(
    trace: RoutingTrace, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token indices to plan from, in random order of requests, and those held back."""
    request = trace.request_T()
    unique, inverse = np.unique(request, return_inverse=True)
    if len(unique) < 2:
        raise InputError(
            "all tokens are of one request: nothing can be held back; record more requests"
        )
    place = np.random.default_rng(seed).permutation(len(unique))[inverse]
    order = np.argsort(place, kind="stable")
    half = np.searchsorted(place[order], len(unique) // 2)
    return order[:half], order[half:]


def _doubling(available: int) -> list[int]:
    """256, 512, … and everything there is; the last doubling may be short of two."""
    sizes = []
    size = _SMALLEST
    while size * 1.5 <= available:
        sizes.append(size)
        size *= 2
    return [*sizes, available]


def _judge(
    trace: RoutingTrace, plan_tokens: npt.NDArray[np.int64], held_tokens: npt.NDArray[np.int64],
    judge: Judge | None, devices: int, seed: int,
) -> float:
    if judge is not None:
        return float(judge(trace.select(plan_tokens), trace.select(held_tokens)))
    return residual_imbalance(
        trace.load_LE(plan_tokens), trace.load_LE(held_tokens), devices, seed=seed
    )


def _needed(
    sizes: list[int], mean: npt.NDArray[np.float64], trace_tokens: int
) -> int:
    """Tokens from which on a doubling buys less than the tolerance, by the fitted curve and by the
    last points themselves.

    Estimation errors fall as 1 / sqrt(n), so the points are fitted by floor + c / sqrt(n), larger n
    weighing more; a doubling at n then buys 0.293 c / sqrt(n). A fit may smooth over what the table
    shows, so the last doubling that was tried must buy less than the tolerance too, or a trace of
    twice the length is asked for. Two digits, rounded up; at least the smallest size tried.
    """
    root = 1 / np.sqrt(np.array(sizes, np.float64))
    design = np.stack([np.ones_like(root), root], axis=1) / root[:, None]
    (_, slope), *_ = np.linalg.lstsq(design, mean / root, rcond=None)
    needed = (max(0.0, float(slope)) * _DOUBLED / TOLERANCE) ** 2
    # The last size may be short of twice the one before; where it is more, the row speaks as it is.
    short = _DOUBLED / (1 - np.sqrt(sizes[-2] / sizes[-1]))
    bought = float(mean[-2] - mean[-1]) * max(1.0, short)
    if bought > TOLERANCE:
        needed = max(needed, 2.0 * trace_tokens)
    unit: int = 10 ** max(0, len(str(int(needed))) - 2)
    return max(sizes[0], int(-(-needed // unit)) * unit)
