"""How far the mean over steps may be off, given that steps share requests.

Knows one number per step and which requests met in it. Knows nothing of plans. Deterministic for a
seed.

Model: step value = mean + sum over requests of share·effect + noise; effects have variance A, noise
has variance N. Neighbouring steps share most of their requests, so their values move together and W
steps are worth far fewer; but whenever a request is replaced by another, the value changes by their
effects, so even a trace in which requests turn over only a few times tells A.

A parametric bootstrap over requests. The likelihood of (A, N) is read on a grid of
h = A's part of a step's variance, uniform beforehand; every resample draws h, then N from its
scaled inverse chi-square, then new requests and noise, and so a new mean. Differences between
plans are fitted as differences, step by step: the comparison is paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...foundation.arrays import FloatArray
from ...traces.steps import Steps
from ...traces.trace import RoutingTrace

MOST_BLOCKS = 600            # longer traces are averaged over runs of neighbouring steps
LEAST_TURNOVER = 0.05        # of the mix of requests must change within the trace
TELLING_MIXES = 30           # with fewer independent ones, redrawing requests tells more
PARTS_H = np.linspace(0.0, 0.995, 200)


@dataclass(frozen=True, eq=False)
class StepMix:
    """How the requests mix over the steps of one trace, seen from its centred overlap matrix.

    overlap: mean over steps of the sum of squared shares (a step's own); mean_overlap: the same of
    the requests' shares of the whole trace. eigen_I, basis_WI: of the centred overlap matrix.
    """

    block_W: npt.NDArray[np.int64]      # the block of each step
    overlap: float
    mean_overlap: float
    eigen_I: FloatArray
    basis_BI: FloatArray

    @property
    def turnover(self) -> float:
        """Which part of the mix changes within the trace; near 0 = the same requests throughout."""
        return float(self.eigen_I.sum() / len(self.basis_BI) / self.overlap)

    @property
    def tells(self) -> bool:
        """Whether the steps' own scatter is the best there is to tell how far off their mean is."""
        return self.distinct_mixes >= TELLING_MIXES

    @property
    def distinct_mixes(self) -> float:
        """How many steps with no request in common would scatter as much as these do."""
        return min(float(len(self.block_W)), self.overlap / self.mean_overlap)


def step_mix(trace: RoutingTrace, steps: Steps, kept: npt.NDArray[np.int64]) -> StepMix:
    """The mix of requests in the `kept` steps. Without requests, blocks of 256 tokens are them."""
    from scipy import sparse  # slow to import, and only comparisons need it

    request = np.unique(trace.request_T()[steps.token], return_inverse=True)[1]
    shape = (len(steps), int(request.max()) + 1)
    ones = np.ones(len(request))
    counts = sparse.coo_matrix((ones, (steps.step_of_token(), request)), shape=shape).tocsr()[kept]
    block_W = np.arange(len(kept)) * min(len(kept), MOST_BLOCKS) // len(kept)
    sizes_B = np.bincount(block_W)
    tokens_W = np.asarray(counts.sum(axis=1)).ravel()
    share_WR = sparse.diags(1.0 / tokens_W) @ counts
    gather = sparse.coo_matrix((1.0 / sizes_B[block_W], (block_W, np.arange(len(kept)))))
    share_BR = gather.tocsr() @ share_WR
    overlap_BB = (share_BR @ share_BR.T).toarray()
    mean_R = np.asarray(share_BR.mean(axis=0)).ravel()
    centred = overlap_BB - overlap_BB.mean(axis=0)
    centred = centred - centred.mean(axis=1, keepdims=True)
    eigen_I, basis_BI = np.linalg.eigh(centred)
    return StepMix(block_W, float(np.trace(overlap_BB)) / len(overlap_BB),
                   float(mean_R @ mean_R), np.maximum(eigen_I, 0.0), basis_BI)


def mean_noise(
    value_W: FloatArray, mix: StepMix, resamples: int, seed: int
) -> FloatArray | None:
    """[B] draws of (mean a new trace of this kind would have) - (true mean); None = cannot be told.

    None where the trace holds too few steps or its requests hardly turn over.
    """
    blocks = len(mix.basis_BI)
    if blocks < 3 or mix.turnover < LEAST_TURNOVER:
        return None
    value_B = np.bincount(mix.block_W, weights=value_W) / np.bincount(mix.block_W)
    part_I = (mix.basis_BI.T @ (value_B - value_B.mean())) ** 2
    rng = np.random.default_rng(seed)
    freedom = blocks - 1                 # the constant vector is one of the basis, with part 0
    if part_I.sum() <= 1e-24 * max(1.0, float(value_B @ value_B)):
        return np.zeros(resamples)
    ratio_H = PARTS_H / (1.0 - PARTS_H) / mix.overlap            # A / N
    spread_HI = 1.0 + ratio_H[:, None] * mix.eigen_I
    noise_H = (part_I / spread_HI).sum(axis=1)                   # freedom times the estimate of N
    log_H = -0.5 * (np.log(spread_HI).sum(axis=1) + freedom * np.log(noise_H))
    weight_H = np.exp(log_H - log_H.max())
    drawn_h = rng.choice(len(PARTS_H), size=resamples, p=weight_H / weight_H.sum())
    noise = noise_H[drawn_h] / rng.chisquare(freedom, size=resamples)
    variance = noise * (ratio_H[drawn_h] * mix.mean_overlap + 1.0 / blocks)
    draws: FloatArray = np.sqrt(variance) * rng.standard_normal(resamples)
    return draws
