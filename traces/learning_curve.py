"""Is a trace long enough? How the worth of a plan grows with the tokens it is made from.

Half of the requests are held back. From the others, n tokens are taken (whole requests in random
order, the last one cut), a plan is judged on the half held back, and n is doubled. What a plan is
worth is for higher floors to say: they hand in a `judge`. Without one, a proxy needs no plan: the
imbalance that remains, on the held-back half, on devices that were exactly balanced by the loads
of the n tokens. Knows loads. Knows nothing of plans, clusters or dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError, UsageError
from .trace import RoutingTrace

Judge = Callable[[RoutingTrace, RoutingTrace], float]
_SMALLEST = 256
_GROUPINGS = 64


@dataclass(frozen=True)
class LearningCurve:
    """Imbalance on unseen requests against the tokens planned from; smaller is better."""

    tokens: tuple[int, ...]           # planned from, rising; the last is all there are
    imbalance: tuple[float, ...]      # mean over repeats
    spread: tuple[float, ...]         # standard deviation over repeats
    held_out_tokens: int
    tolerance: float
    enough_tokens: int | None         # from here on a doubling buys less than the tolerance
    likely_tokens: int | None         # where that would be, when the trace is too short
    judged_by: str

    @property
    def long_enough(self) -> bool:
        """Whether more tokens would change the plan's worth by less than the tolerance."""
        return self.enough_tokens is not None

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        last = f"{self.imbalance[-1]:.3f}"
        if self.enough_tokens is not None:
            return (
                f"long enough: from {self.enough_tokens:,} tokens on, twice as many improve the "
                f"imbalance on unseen requests by less than {self.tolerance:g} (it is {last})"
            )
        hint = f"; about {self.likely_tokens:,} are likely to do" if self.likely_tokens else ""
        return (
            f"too short: twice as many tokens would still improve the imbalance on unseen requests "
            f"by {self.tolerance:g} or more (it is {last} from {self.tokens[-1]:,} tokens){hint}"
        )


def learning_curve(
    trace: RoutingTrace, *, judge: Judge | None = None, devices: int = 8, repeats: int = 4,
    tolerance: float = 0.01, seed: int = 0,
) -> LearningCurve:
    """Plan from 256, 512, … tokens and judge each time on requests held back.

    judge(plan_from, held_out) -> imbalance >= 1 of a plan made from the first trace on the second.
    Without it, the proxy of this module for `devices` devices with equal numbers of experts.
    repeats: random halves of the requests, averaged. tolerance: improvement that does not matter.
    A trace without requests is cut in blocks of 256 tokens (optimistic: a request's tokens are
    alike). Raises InputError on a trace too short for two points.
    """
    if devices < 1 or repeats < 1 or tolerance <= 0:
        raise UsageError(
            f"need devices >= 1, repeats >= 1, tolerance > 0; got {devices}, {repeats}, {tolerance}"
        )
    splits = [_split(trace, seed + r) for r in range(repeats)]
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
    enough = _first_flat(sizes, mean, tolerance)
    return LearningCurve(
        tokens=tuple(sizes), imbalance=tuple(map(float, mean)),
        spread=tuple(map(float, judged.std(axis=1))),
        held_out_tokens=round(float(np.mean([len(held) for _, held in splits]))),
        tolerance=tolerance, enough_tokens=enough,
        likely_tokens=None if enough else _extrapolated(sizes, mean, tolerance),
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


def _first_flat(
    sizes: list[int], mean: npt.NDArray[np.float64], tolerance: float
) -> int | None:
    """The smallest size from which on no doubling improves by the tolerance or more."""
    gain_per_doubling = -np.diff(mean) / np.log2(np.array(sizes[1:]) / np.array(sizes[:-1]))
    steep = np.flatnonzero(gain_per_doubling >= tolerance)
    first = 0 if len(steep) == 0 else int(steep[-1]) + 1
    return sizes[first] if first < len(sizes) - 1 else None


def _extrapolated(
    sizes: list[int], mean: npt.NDArray[np.float64], tolerance: float
) -> int | None:
    """Where a doubling would buy less than the tolerance, if the rest falls as 1 / sqrt(n).

    The last two points fix the curve floor + c / sqrt(n); a doubling at n buys 0.293 c / sqrt(n).
    None where the last point is no better than the one before.
    """
    root = 1.0 / np.sqrt(np.array(sizes[-2:], np.float64))
    slope = float((mean[-2] - mean[-1]) / (root[0] - root[1]))
    if slope <= 0:
        return None
    needed = (slope * (1 - 1 / np.sqrt(2)) / tolerance) ** 2
    digits = 10 ** max(0, len(str(int(needed))) - 2)
    return max(sizes[-1], int(-(-needed // digits) * digits))
