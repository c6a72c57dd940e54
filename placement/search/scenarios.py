"""The traffic a search prepares for: today's steps, and a stated prior on how the mix may change.

Three kinds of rows, each an [E] load scaled so that perfect balance is 1:
  home      sampled steps of the trace, moved away from their mean, so that once all are perfect the
            search still moves towards plans with spare capacity;
  requests  one kind of request makes up the whole step: requests are clustered by what they use,
            a cluster is drawn, then a few of its members (weights uniform on the simplex), moved
            away from the mean, times lognormal noise. Rare kinds count as much as common ones:
            what is rare today may be all there is tomorrow;
  unknown   shares to a power below one, times lognormal noise: a domain nobody has seen.
The constants are the prior, the same for every trace; they were not fitted to any one.

Knows loads. Knows nothing of devices beyond their total speed, of plans or of search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...foundation.arrays import FloatArray
from ...foundation.compiled import compiled


@dataclass(frozen=True)
class Prior:
    """How much each kind of row weighs, and how far traffic may move."""

    home: float = 0.8
    requests: float = 0.15
    unknown: float = 0.05
    hardening: float = 1.5        # home and request rows move this much further from their mean
    kinds: int = 24               # clusters of requests
    requests_mixed: int = 3
    request_noise: float = 0.3    # sigma of the log of each expert's load
    persistence: float = 0.3      # power on today's shares in an unseen domain
    spread: float = 1.0           # sigma of the log there


PRIOR = Prior()


@dataclass(frozen=True)
class Rows:
    """Rows to search on, and their weights (which sum to 1)."""

    load_WE: FloatArray
    weight_W: FloatArray


def home_rows(load_WE: FloatArray, speed: float, prior: Prior = PRIOR) -> FloatArray:
    """Steps with tokens, hardened: x' = max(0, mean + h·(x − mean)), renormalised."""
    share = _shares(load_WE)
    if len(share) == 0:
        return share
    return _scaled(_hardened(share, share.mean(axis=0), prior.hardening), speed)


def request_rows(
    kinds: list[FloatArray], count: int, speed: float, rng: np.random.Generator,
    prior: Prior = PRIOR,
) -> FloatArray:
    """`count` steps made of one kind of request each; empty where there are no kinds.

    kinds: shares [r, E] of each cluster's requests (`request_kinds`).
    """
    if not kinds:
        return np.empty((0, 0))
    share_RE = np.concatenate(kinds)
    size_K = np.array([len(kind) for kind in kinds])
    first_K = np.cumsum(size_K) - size_K
    kind = rng.integers(0, len(kinds), count)
    draw = rng.random((count, prior.requests_mixed))
    chosen = first_K[kind][:, None] + (draw * size_K[kind][:, None]).astype(np.int64)
    weight = rng.dirichlet(np.ones(prior.requests_mixed), count)
    mixed = (share_RE[chosen] * weight[:, :, None]).sum(axis=1)
    hard = _hardened(mixed, share_RE.mean(axis=0), prior.hardening)
    hard += FLOOR / share_RE.shape[1]
    return _scaled(hard * np.exp(prior.request_noise * rng.standard_normal(hard.shape)), speed)


def request_kinds(load_RE: FloatArray, prior: Prior = PRIOR) -> list[FloatArray]:
    """Requests clustered by their shares: a list of [r, E], empty for fewer than two requests.

    Requests much shorter than most are left out: their shares are noise. k-means from centres that
    lie far apart (farthest first), a fixed number of rounds; ties go to the lower index.
    """
    total_R = load_RE.sum(axis=1)
    share = _shares(load_RE[total_R >= max(1.0, 0.25 * float(np.median(total_R)))])
    if len(share) < 2:
        return []
    centre_KE = share[_far_apart(share, prior.kinds)]
    for _ in range(KMEANS_ROUNDS):
        nearest_R = _nearest(share, np.ascontiguousarray(centre_KE.T))
        members = [share[nearest_R == k] for k in range(len(centre_KE))]
        members = [m for m in members if len(m)]
        centre_KE = np.stack([m.mean(axis=0) for m in members])
    return members


KMEANS_ROUNDS = 8


@compiled
def _nearest(share_RE: Any, centre_EK: Any) -> Any:
    """[R] the centre closest to each row. Sums in a fixed order, so that no two machines differ."""
    nearest_R = np.zeros(len(share_RE), np.int64)
    square_K = np.empty(centre_EK.shape[1])
    for r in range(len(share_RE)):
        square_K[:] = 0.0
        for e in range(len(centre_EK)):
            for k in range(len(square_K)):
                apart = share_RE[r, e] - centre_EK[e, k]
                square_K[k] += apart * apart
        nearest_R[r] = np.argmin(square_K)
    return nearest_R


def _far_apart(share: FloatArray, count: int) -> list[int]:
    """Rows that lie far from each other: the most ordinary one, then always the farthest."""
    first = int(np.argmin(np.abs(share - share.mean(axis=0)).sum(axis=1)))
    chosen, distance = [first], np.abs(share - share[first]).sum(axis=1)
    while len(chosen) < min(count, len(share)):
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.abs(share - share[chosen[-1]]).sum(axis=1))
    return chosen


def unknown_rows(
    load_E: FloatArray, count: int, speed: float, rng: np.random.Generator, prior: Prior = PRIOR
) -> FloatArray:
    """`count` steps of domains nobody has seen; an expert unused today may be used there."""
    share_E = np.maximum(load_E / load_E.sum(), FLOOR / len(load_E))
    noise = np.exp(prior.spread * rng.standard_normal((count, len(load_E))))
    return _scaled(share_E**prior.persistence * noise, speed)


FLOOR = 1e-2     # of the mean share: no expert is thought impossible


def search_rows(
    home: FloatArray,
    kinds: list[FloatArray],
    count: int,
    speed: float,
    rng: np.random.Generator,
    prior: Prior = PRIOR,
) -> Rows:
    """Home rows (as they are) with `count` fresh scenario rows of each kind, weighted."""
    parts = [
        (home, prior.home),
        (request_rows(kinds, count, speed, rng, prior), prior.requests),
        (unknown_rows(home.mean(axis=0), count, speed, rng, prior), prior.unknown),
    ]
    parts = [(rows, weight) for rows, weight in parts if len(rows) and weight > 0]
    total = sum(weight for _, weight in parts)
    return Rows(
        np.concatenate([rows for rows, _ in parts]),
        np.concatenate([np.full(len(rows), w / total / len(rows)) for rows, w in parts]),
    )


def _shares(load_WE: FloatArray) -> FloatArray:
    total_W = load_WE.sum(axis=1)
    return np.asarray(load_WE[total_W > 0] / total_W[total_W > 0, None], np.float64)


def _hardened(share_WE: FloatArray, mean_E: FloatArray, hardening: float) -> FloatArray:
    return np.maximum(0.0, mean_E + hardening * (share_WE - mean_E))


def _scaled(row_WE: FloatArray, speed: float) -> FloatArray:
    return np.asarray(row_WE / row_WE.sum(axis=1, keepdims=True) * speed)
