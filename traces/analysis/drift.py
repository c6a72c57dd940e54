"""How far routing moved between two traces or profiles, and how far chance alone moves it.

Jensen-Shannon divergence of expert loads per layer, in bits (0: the same, 1: disjoint). Loads of
finite samples always differ, and the tokens of a request are similar, so the noise floor is printed
with it: the divergence between random halves of one side, split by requests. Knows loads and
requests. Knows nothing of plans: whether a drift costs anything is for `placement` to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...foundation.arrays import FloatArray
from ..profile import Profile
from ..trace import RoutingTrace

_BLOCKS = 64
SHUFFLES = 200


@dataclass(frozen=True)
class Drift:
    """Divergence per layer and on average, in bits, with the noise floor."""

    bits_L: FloatArray
    floor_bits_L: FloatArray | None   # None: too few requests or windows to split
    bits: float                       # mean over layers
    floor_bits: float | None
    worst_layer: int                  # counted from 0; ties go to the lower
    chance: float | None              # share of random regroupings that diverge as much

    @property
    def moved(self) -> bool | None:
        """Whether chance is an unlikely explanation (5 %); None where that is not known."""
        return None if self.chance is None else self.chance <= 0.05


def jsd_bits(p: npt.ArrayLike, q: npt.ArrayLike) -> Any:
    """Jensen-Shannon divergence of two loads over experts (the last axis), in bits.

    p, q: non-negative, of one shape [..., E]; each row is normalised first. Returns [...] in
    [0, 1]; nan where a row has no load. Symmetric. The divergence itself, not its root.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        p_E, q_E = _shares(p), _shares(q)
        middle = (p_E + q_E) / 2
        divergence = entropy_bits(middle) - (entropy_bits(p_E) + entropy_bits(q_E)) / 2
    return np.clip(divergence, 0.0, 1.0)


def entropy_bits(share: npt.ArrayLike) -> Any:
    """Entropy of shares over the last axis, in bits; empty classes count nothing."""
    share_E = np.asarray(share, np.float64)
    logs = np.log2(share_E, where=share_E > 0, out=np.zeros_like(share_E))
    return -(share_E * logs).sum(axis=-1) + 0.0 * share_E.sum(axis=-1)  # nan rows stay nan


def drift(
    before: RoutingTrace | Profile, after: RoutingTrace | Profile, *, seed: int = 0,
    shuffles: int = SHUFFLES,
) -> Drift:
    """How far the second one's loads are from the first one's.

    Floor: each side's requests are split in two at random (a load-only profile's windows instead),
    mean over both sides and `shuffles` splits. The halves are half as long as the sides, so the
    floor errs upwards. `chance`: requests of both sides, in up to 64 blocks a side, are dealt out
    anew to two sides; the share of deals whose mean divergence is at least the real one. Raises
    InputError where the two are not of one model.
    """
    blocks_a, blocks_b = _block_loads(before, seed), _block_loads(after, seed + 1)
    if blocks_a.shape[1:] != blocks_b.shape[1:]:
        raise InputError(
            f"loads with (layers, experts) = {blocks_a.shape[1:]} and {blocks_b.shape[1:]} cannot "
            "be compared: the traces are of different models"
        )
    bits_L: FloatArray = jsd_bits(blocks_a.sum(axis=0), blocks_b.sum(axis=0))
    rng = np.random.default_rng(seed)
    floors = [_split_half(b, rng, shuffles) for b in (blocks_a, blocks_b) if len(b) >= 2]
    floor_L = np.mean(floors, axis=0) if floors else None
    return Drift(
        bits_L=bits_L, floor_bits_L=floor_L, bits=float(np.nanmean(bits_L)),
        floor_bits=None if floor_L is None else float(np.nanmean(floor_L)),
        worst_layer=int(np.nanargmax(bits_L)),
        chance=_chance(blocks_a, blocks_b, rng, shuffles, float(np.nanmean(bits_L))),
    )


def split_half_floor(trace: RoutingTrace | Profile, *, seed: int = 0) -> float:
    """Mean divergence in bits between random halves of the requests, over layers and splits.

    Raises InputError where there are not two requests (or windows) to split.
    """
    blocks = _block_loads(trace, seed)
    if len(blocks) < 2:
        raise InputError("a split-half floor needs at least 2 requests or windows; there is 1")
    return float(np.nanmean(_split_half(blocks, np.random.default_rng(seed), SHUFFLES)))


def _shares(load: npt.ArrayLike) -> FloatArray:
    load_E = np.asarray(load, np.float64)
    shares: FloatArray = load_E / load_E.sum(axis=-1, keepdims=True)
    return shares


def _block_loads(source: RoutingTrace | Profile, seed: int) -> FloatArray:
    """[B, L, E] loads of up to 64 blocks, each a random share of the requests (or a window)."""
    if isinstance(source, Profile):
        if source.sample is None:
            used: FloatArray = source.load_WLE[source.load_WLE.sum(axis=(1, 2)) > 0]
            return used
        source = source.sample
    unique, inverse = np.unique(source.request_T(), return_inverse=True)
    blocks = min(_BLOCKS, len(unique))
    block_of = np.random.default_rng(seed).permutation(len(unique)) % blocks
    block_T, experts = block_of[inverse], source.num_experts
    loads = np.empty((blocks, source.num_layers, experts), np.float64)
    valid = source.valid_TLK()
    for layer in range(source.num_layers):
        cell = block_T[:, None] * experts + source.ids[:, layer]
        chosen = cell.reshape(-1) if valid is None else cell[valid[:, layer]]
        loads[:, layer] = np.bincount(chosen, minlength=blocks * experts).reshape(blocks, experts)
    return loads


def _split_half(blocks_BLE: FloatArray, rng: np.random.Generator, shuffles: int) -> FloatArray:
    """[L] mean divergence between two random halves of the blocks."""
    total: FloatArray = np.zeros(blocks_BLE.shape[1])
    for _ in range(shuffles):
        order = rng.permutation(len(blocks_BLE))
        half = len(order) // 2
        total += jsd_bits(blocks_BLE[order[:half]].sum(0), blocks_BLE[order[half:]].sum(0))
    mean_L: FloatArray = total / shuffles
    return mean_L


def _chance(
    blocks_a: FloatArray, blocks_b: FloatArray, rng: np.random.Generator, shuffles: int,
    observed_bits: float,
) -> float | None:
    """Share of random regroupings of both sides' blocks that diverge at least as much.

    A block counts with its tokens, so the two dealt sides have about the sizes of the real ones.
    None where too few blocks are there for 5 % to be reachable.
    """
    if min(len(blocks_a), len(blocks_b)) < 4:
        return None
    pool = np.concatenate([blocks_a, blocks_b])
    total = pool.sum(axis=0)
    reached = 0
    for _ in range(shuffles):
        side = pool[rng.permutation(len(pool))[: len(blocks_a)]].sum(axis=0)
        reached += float(np.nanmean(jsd_bits(side, total - side))) >= observed_bits
    return (1 + reached) / (1 + shuffles)
