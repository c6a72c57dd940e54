"""How much of a layer's exchange hides behind compute, under the schedule an engine runs.

Takes times in microseconds, [W steps, L layers], and returns the time a layer adds to the step.
Knows schedules. Knows nothing of tokens, plans, clusters or clocks; `cost.py` makes the times.

Sources: two-batch overlap as in DeepSeek's and SGLang's serving; FSMoE (ASPLOS'25) for the pipeline
degree and its four cases; ScMoE (arXiv 2404.05019) for the shortcut's slots; ScheMoE's Pipe-A2A for
intra- and inter-node sends side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...foundation.arrays import FloatArray

Schedule = Literal["none", "two_batch", "pipeline", "scmoe"]
MAX_DEGREE = 32


@dataclass(frozen=True)
class Overlap:
    """The active schedule.

    none: dispatch, experts, combine one after the other. two_batch: the step's tokens in two
    halves, one computes while the other exchanges. pipeline: `degree` chunks (None = the best of
    1..32 for each step and layer). scmoe: the experts read the block before, so their exchange
    hides behind the main stream's operators `main_us`.
    `slowdown`: an exchange that shares the device with compute takes this many times as long
    (1.3 to 1.8 in DeepSeek's published profiles, an estimate).
    `intra_inter`: whether sends inside and between nodes run side by side or one after the other.
    """

    schedule: Schedule = "none"
    degree: int | None = None
    slowdown: float = 1.0
    main_us: tuple[float, ...] = ()
    intra_inter: Literal["parallel", "serial"] = "parallel"

    def __post_init__(self) -> None:
        if self.schedule not in ("none", "two_batch", "pipeline", "scmoe"):
            raise UsageError(
                f"unknown overlap schedule {self.schedule!r}: none, two_batch, pipeline or scmoe"
            )
        if self.degree is not None and not 1 <= self.degree <= MAX_DEGREE:
            raise UsageError(f"overlap degree {self.degree} must lie in 1..{MAX_DEGREE}")
        if not (np.isfinite(self.slowdown) and self.slowdown >= 1.0):
            raise UsageError(f"overlap slowdown {self.slowdown} must be finite and at least 1")
        if self.schedule == "scmoe" and not self.main_us:
            raise UsageError("overlap scmoe needs main_us: times of the main stream's operators")
        if any(not np.isfinite(t) or t < 0 for t in self.main_us):
            raise UsageError(f"overlap main_us must be finite and >= 0; got {list(self.main_us)}")
        if self.intra_inter not in ("parallel", "serial"):
            raise UsageError(f"overlap intra_inter {self.intra_inter!r}: parallel or serial")


@dataclass(frozen=True)
class LayerTimes:
    """One layer's phases, [W, L] each.

    compute: the slowest device's experts; compute_fixed: the part of it that a smaller batch does
    not shrink (start, weights read). dispatch, combine: the exchanges between nodes (or the whole
    exchange where nothing tells them apart); *_intra: the part inside a node; exchange_fixed: the
    start of one exchange, paid again for each chunk. other: attention, norms and shared experts of
    the layer, counted by the caller's step time already. background: other traffic between nodes
    that needs the links meanwhile (weights on the move).
    """

    compute: FloatArray
    dispatch: FloatArray
    combine: FloatArray
    compute_fixed: FloatArray | float = 0.0
    dispatch_intra: FloatArray | float = 0.0
    combine_intra: FloatArray | float = 0.0
    exchange_fixed: float = 0.0
    other: FloatArray | float = 0.0
    background: FloatArray | float = 0.0


def schedule_layer(
    overlap: Overlap | None,
    compute_WL: FloatArray,
    dispatch_WL: FloatArray,
    combine_WL: FloatArray,
    *,
    compute_fixed_WL: FloatArray | float = 0.0,
    dispatch_intra_WL: FloatArray | float = 0.0,
    combine_intra_WL: FloatArray | float = 0.0,
    exchange_fixed_us: float = 0.0,
    other_us: FloatArray | float = 0.0,
    background_us: FloatArray | float = 0.0,
) -> FloatArray:
    """[W, L] microseconds that the expert layer adds to the step, in addition to `other_us`.

    None is the plain sum of dispatch, compute and combine. Never below the compute alone, except
    that two_batch may hide compute behind an exchange that is longer, and the reverse.
    """
    times = LayerTimes(
        compute_WL, dispatch_WL, combine_WL, compute_fixed_WL, dispatch_intra_WL,
        combine_intra_WL, exchange_fixed_us, other_us, background_us,
    )
    if overlap is None:
        return compute_WL + dispatch_WL + combine_WL
    if overlap.schedule == "two_batch":
        return _two_batch(overlap, times)
    if overlap.schedule == "pipeline":
        return _pipeline(overlap, times)
    if overlap.schedule == "scmoe":
        return _scmoe(overlap, times)
    dispatch, combine = _whole_exchanges(overlap, times)
    return times.compute + dispatch + combine


def exchange_us(
    inter: FloatArray, intra: FloatArray | float, intra_inter: Literal["parallel", "serial"]
) -> FloatArray:
    """Time of a two-tier exchange: the longer tier side by side, the sum one after the other."""
    return np.maximum(inter, intra) if intra_inter == "parallel" else inter + intra


def _whole_exchanges(overlap: Overlap, times: LayerTimes) -> tuple[FloatArray, FloatArray]:
    dispatch = exchange_us(times.dispatch, times.dispatch_intra, overlap.intra_inter)
    combine = exchange_us(times.combine, times.combine_intra, overlap.intra_inter)
    return dispatch, combine


def _part(
    whole: FloatArray | float, fixed: FloatArray | float, parts: int
) -> FloatArray | float:
    """Time of one of `parts` equal chunks: the fixed part is paid by each."""
    fixed = np.minimum(fixed, whole)
    return fixed + (whole - fixed) / parts


def _two_batch(overlap: Overlap, times: LayerTimes) -> FloatArray:
    """Steady state of two halves: the busier of compute and links, or one half's own chain."""
    dispatch, combine = _whole_exchanges(overlap, times)
    compute_half = _part(times.compute, times.compute_fixed, 2)
    links_half = overlap.slowdown * (
        _part(dispatch, times.exchange_fixed, 2) + _part(combine, times.exchange_fixed, 2)
    )
    own_half = np.asarray(times.other) / 2
    busy = np.maximum(2 * (own_half + compute_half), 2 * links_half)
    period = np.maximum(busy, own_half + compute_half + links_half)
    # Splitting never has to be used: the engine runs the plain order where it is faster.
    plain = times.compute + dispatch + combine
    return np.minimum(period - times.other, plain)


def _pipeline(overlap: Overlap, times: LayerTimes) -> FloatArray:
    if overlap.degree is not None:
        return pipeline_us(times, overlap.degree, overlap.slowdown)
    best: FloatArray = np.min(
        [pipeline_us(times, r, overlap.slowdown) for r in range(1, MAX_DEGREE + 1)], axis=0
    )
    return best


def pipeline_us(times: LayerTimes, degree: int, slowdown: float = 1.0) -> FloatArray:
    """FSMoE's time of one layer cut into `degree` chunks, all four cases, [W, L].

    r = degree; per chunk: a2a between nodes, ag and rs inside a node, exp the experts; gar is the
    background traffic. Links are slowed only where chunks overlap (r > 1).
    Case 1: gar sets the pace. 2: the experts do. 3: the links between nodes. 4: those inside.
    """
    r = degree
    slow = slowdown if r > 1 else 1.0
    a2a = slow * (_part(times.dispatch, times.exchange_fixed, r)
                  + _part(times.combine, times.exchange_fixed, r)) / 2
    ag = slow * np.asarray(_part(times.dispatch_intra, times.exchange_fixed, r))
    rs = slow * np.asarray(_part(times.combine_intra, times.exchange_fixed, r))
    exp = _part(times.compute, times.compute_fixed, r)
    gar = times.background
    inside = ag + rs
    case = fsmoe_case(a2a, ag, rs, exp, gar, r)
    time_by_case = [
        2 * r * a2a + gar,
        2 * a2a + inside + r * exp,
        2 * r * a2a + inside,
        2 * a2a + r * inside,
    ]
    chosen: FloatArray = np.select([case == 1, case == 2, case == 3, case == 4], time_by_case)
    return chosen


def fsmoe_case(
    a2a: FloatArray | float,
    ag: FloatArray | float,
    rs: FloatArray | float,
    exp: FloatArray | float,
    gar: FloatArray | float,
    degree: int,
) -> npt.NDArray[np.int64]:
    """Which of FSMoE's four cases holds (1..4); arguments are per-chunk times."""
    r = degree
    inside = np.asarray(ag) + rs
    q1, q2, q3 = a2a > np.asarray(ag), r * exp > 2 * (r - 1) * np.asarray(a2a), (
        r * exp > (r - 1) * inside
    )
    q4 = gar > inside
    q5 = gar > r * exp - 2 * (r - 1) * a2a + inside
    q6 = gar > r * inside - 2 * (r - 1) * a2a
    q7 = gar > inside + r * exp - 2 * (r - 1) * a2a
    case_1 = (q1 & ~q2 & q4) | (q1 & q2 & q5) | (~q1 & ~q3 & q6) | (~q1 & q3 & q7)
    case_2 = (q1 & q2) | (~q1 & q3)
    return np.where(case_1, 1, np.where(case_2, 2, np.where(q1, 3, 4))).astype(np.int64)


def _scmoe(overlap: Overlap, times: LayerTimes) -> FloatArray:
    """The experts' own time plus what of their exchange the main stream cannot cover."""
    dispatch, combine = _whole_exchanges(overlap, times)
    dispatch, combine = overlap.slowdown * dispatch, overlap.slowdown * combine
    slot = scmoe_slot(float(dispatch.mean()), float(combine.mean()), overlap.main_us)
    before, after = sum(overlap.main_us[:slot]), sum(overlap.main_us[slot:])
    exposed = np.maximum(0.0, dispatch - before) + np.maximum(0.0, combine - after)
    exposed_WL: FloatArray = times.compute + exposed
    return exposed_WL


def scmoe_slot(dispatch_us: float, combine_us: float, main_us: tuple[float, ...]) -> int:
    """How many main-stream operators run before the experts; ties go to the earlier slot.

    ScMoE's rule: the time before is closest to the dispatch, the time after to the combine.
    """
    distance = [
        abs(sum(main_us[:k]) - dispatch_us) + abs(sum(main_us[k:]) - combine_us)
        for k in range(len(main_us) + 1)
    ]
    return int(np.argmin(distance))
