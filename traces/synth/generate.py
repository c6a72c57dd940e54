"""Synthetic routing: loads with the skew, affinity and drift of real routers, from a seed.

Two things: the load matrices of the benchmark families a288, a320, b320 and c512, and traces of
tokens. A token of a trace follows a block of experts through the layers (affinity), tokens of one
request have similar ones (persistence), domains favour different experts and may take turns in
time. Knows loads and tokens. Knows nothing of devices beyond the numbers a family names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...foundation.arrays import FloatArray
from ..model_config.layer_ranges import MOST_LAYERS
from ..model_spec import MOST_EXPERTS
from ..trace import DECODE, PREFILL, RoutingTrace
from .sampling import BlockTables, sample_ids

FAMILY_TOKENS, FAMILY_TOP_K = 200_000, 8
MOST_ZIPF = 50.0             # beyond it the last experts' shares are no numbers any more


@dataclass(frozen=True)
class Family:
    """Size of a benchmark instance: layers, experts, and the cluster it is to be planned for."""

    layers: int
    experts: int
    slots: int
    devices: int
    nodes: int
    groups: int


FAMILIES = {
    "a288": Family(58, 256, 288, 32, 4, 8),
    "a320": Family(58, 256, 320, 32, 4, 8),
    "b320": Family(58, 256, 320, 64, 8, 8),
    "c512": Family(61, 384, 512, 128, 16, 1),
}


@dataclass(frozen=True)
class Instance:
    """One draw of a family: 200,000 tokens of top-8 assignments, three times."""

    name: str
    family: Family
    share_LE: FloatArray                     # what the loads were drawn from
    load_LE: npt.NDArray[np.int64]           # to plan from
    next_LE: npt.NDArray[np.int64]           # the same distribution again
    drifted_LE: npt.NDArray[np.int64]        # after lognormal(0.3) drift

    def trace(self, tokens: int, *, seed: int = 0) -> RoutingTrace:
        """Tokens that route by the instance's shares, without affinity. [tokens, L, 8]."""
        return synth_trace(
            share_LE=self.share_LE, top_k=FAMILY_TOP_K, tokens=tokens, block_share=0.0, seed=seed
        )


def instance(name: str, zipf: float, seed: int) -> Instance:
    """The benchmark instance of this family, exponent and seed, bit for bit.

    Per layer: shares 1/rank**zipf in random order, times lognormal(0.25), capped at 1/8 (no expert
    can be chosen by more than every token); then multinomial counts. numpy's default_rng(seed)
    serves every draw in this order, so the numbers repeat wherever numpy's streams do.
    """
    if name not in FAMILIES:
        raise UsageError(f"unknown family {name!r}; there are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    rng = np.random.default_rng(seed)
    share_LE = zipf_shares(rng, family.layers, family.experts, zipf, cap=1 / FAMILY_TOP_K)
    load, following = (_multinomial(rng, share_LE) for _ in range(2))
    drifted = share_LE * np.exp(0.3 * rng.standard_normal(share_LE.shape))
    return Instance(
        name, family, share_LE, load, following,
        _multinomial(rng, drifted / drifted.sum(axis=1, keepdims=True)),
    )


def zipf_shares(
    rng: np.random.Generator, layers: int, experts: int, zipf: float, *, spread: float = 0.25,
    cap: float = 1.0,
) -> FloatArray:
    """[L, E] shares of a layer's assignments: Zipf times lognormal, in random order, rows sum to 1.

    cap: largest share (at most 20 rounds of clipping and renormalising).
    """
    ranks = np.arange(1, experts + 1)
    share_LE = np.stack([rng.permutation(1 / ranks**zipf) for _ in range(layers)])
    share_LE = share_LE * np.exp(spread * rng.standard_normal((layers, experts)))
    return _capped(share_LE / share_LE.sum(axis=1, keepdims=True), cap)


def synth_trace(
    *,
    layers: int = 58,
    experts: int = 256,
    top_k: int = 8,
    tokens: int = 200_000,
    zipf: float = 1.0,
    spread: float = 0.25,
    share_LE: FloatArray | None = None,
    blocks: int | None = None,
    block_share: float = 0.8,
    affinity: float = 0.9,
    persistence: float = 0.7,
    domains: int = 1,
    domain_spread: float = 0.7,
    switch_tokens: int | None = None,
    request_tokens: int = 300,
    prompt_share: float = 0.7,
    seed: int = 0,
) -> RoutingTrace:
    """A trace of `tokens` tokens in requests, with the statistics of a real router.

    zipf, spread: skew of each layer's loads (or give `share_LE` itself). Each layer's experts fall
    into `blocks` random groups, by default of about 2K experts; a token makes `block_share` of its
    choices inside its block, keeps its place among the blocks from layer to layer with probability
    `affinity`, and takes it over from the token before it with probability `persistence`. Every
    domain multiplies the shares by its own lognormal(domain_spread); requests draw their domain at
    random, or, with `switch_tokens`, domains take turns in stretches of about so many tokens.
    Request lengths are geometric with mean `request_tokens`; the first `prompt_share` of each is
    prefill.
    A token never chooses an expert twice. Equal arguments give an equal trace.
    """
    if share_LE is not None:
        layers, experts = share_LE.shape
    shares = (block_share, affinity, persistence, prompt_share)
    _check(layers, experts, top_k, tokens, domains, blocks, shares)
    _check_skew(zipf, switch_tokens)
    rng = np.random.default_rng(seed)
    if share_LE is None:
        share_LE = zipf_shares(rng, layers, experts, zipf, spread=spread, cap=1 / top_k)
    share_DLE = _domain_shares(rng, share_LE, domains, domain_spread, top_k)
    groups = max(1, experts // (2 * top_k)) if blocks is None else blocks
    tables = BlockTables.of(share_DLE, _random_blocks(rng, layers, experts, groups))
    request_T, position_T, length_T = _requests(rng, tokens, request_tokens)
    domain_R = _domains_of_requests(rng, request_T, domains, switch_tokens)
    ids_LTK = sample_ids(
        tables, request_T, domain_R, top_k, shares[:3], seed
    )
    return RoutingTrace.from_arrays(
        ids_LTK.transpose(1, 0, 2), num_experts=experts, request=request_T,
        phase=np.where(position_T < prompt_share * length_T, PREFILL, DECODE),
        domain=domain_R[request_T], domain_names=[f"domain-{d}" for d in range(domains)],
        model_name="synth",
    )


def _check(
    layers: int, experts: int, top_k: int, tokens: int, domains: int, blocks: int | None,
    shares: tuple[float, ...],
) -> None:
    if not (1 <= layers <= MOST_LAYERS and 1 <= experts <= MOST_EXPERTS):
        raise UsageError(
            f"layers {layers} must lie in [1, {MOST_LAYERS}], experts {experts} in "
            f"[1, {MOST_EXPERTS}]"
        )
    if not 1 <= top_k <= experts or not 1 <= domains <= tokens:
        raise UsageError(
            f"top_k {top_k} must lie in [1, {experts}], the number of experts; tokens {tokens} "
            f"must be at least 1, domains {domains} in [1, tokens]"
        )
    if blocks is not None and not 1 <= blocks <= experts:
        raise UsageError(f"blocks {blocks} must lie in [1, {experts}], the number of experts")
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise UsageError(
            "block_share {}, affinity {}, persistence {} and prompt_share {} must lie in "
            "[0, 1]".format(*shares)
        )


def _check_skew(zipf: float, switch_tokens: int | None) -> None:
    if not 0.0 <= zipf <= MOST_ZIPF:
        raise UsageError(f"zipf {zipf} must lie in [0, {MOST_ZIPF:g}]: 0 is flat")
    if switch_tokens is not None and switch_tokens < 1:
        raise UsageError(f"switch_tokens {switch_tokens} must be at least 1, or left out")


def _capped(share_LE: FloatArray, cap: float) -> FloatArray:
    for _ in range(20):
        if share_LE.max() <= cap:
            break
        share_LE = np.minimum(share_LE, cap)
        share_LE = share_LE / share_LE.sum(axis=1, keepdims=True)
    return share_LE


def _multinomial(rng: np.random.Generator, share_LE: FloatArray) -> npt.NDArray[np.int64]:
    draws = FAMILY_TOKENS * FAMILY_TOP_K
    return np.stack([rng.multinomial(draws, share_E) for share_E in share_LE])


def _domain_shares(
    rng: np.random.Generator, share_LE: FloatArray, domains: int, spread: float, top_k: int
) -> FloatArray:
    """[D, L, E]; a single domain has the shares themselves."""
    if domains == 1:
        return share_LE[None]
    tilt = np.exp(spread * rng.standard_normal((domains, *share_LE.shape)))
    share_DLE = share_LE * tilt
    share_DLE /= share_DLE.sum(axis=2, keepdims=True)
    return np.stack([_capped(share, 1 / top_k) for share in share_DLE])


def _random_blocks(
    rng: np.random.Generator, layers: int, experts: int, blocks: int
) -> npt.NDArray[np.int64]:
    """[L, E] block of each expert; sizes differ by at most one."""
    return np.stack([rng.permutation(np.arange(experts) % blocks) for _ in range(layers)])


def _requests(
    rng: np.random.Generator, tokens: int, mean: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Request, position in it and its length, each [T]; the last request is cut."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths += rng.geometric(1 / max(1, mean), 1 + tokens // max(1, mean)).tolist()
    ends = np.minimum(np.cumsum(lengths), tokens)
    size_R = np.diff(ends, prepend=0)
    size_R = size_R[size_R > 0]
    request_T = np.repeat(np.arange(len(size_R)), size_R)
    start_R = np.cumsum(size_R) - size_R
    return request_T, np.arange(tokens) - start_R[request_T], size_R[request_T]


def _domains_of_requests(
    rng: np.random.Generator, request_T: npt.NDArray[np.int64], domains: int,
    switch_tokens: int | None,
) -> npt.NDArray[np.int64]:
    """[R] at random, or by the place of the request's first token in stretches taking turns."""
    requests = int(request_T[-1]) + 1
    if switch_tokens is None:
        return rng.integers(0, domains, requests)
    first_T = np.searchsorted(request_T, np.arange(requests))
    return (first_T // max(1, min(switch_tokens, len(request_T)))) % domains
