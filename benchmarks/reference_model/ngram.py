"""Byte n-gram models to measure the reference model against: unigram, order 3.

Knows counts of bytes and their contexts. Knows nothing of neural models. Interpolated with
Witten-Bell weights: at order n, p = (count(c, b) + kinds(c) p') / (count(c) + kinds(c)), where c is
the n bytes before, kinds(c) how many different bytes followed c, p' the same model one order lower,
and below order 0 every byte has probability 1/256. (Witten and Bell, 1991; Chen and Goodman, 1999)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .corpus import ByteArray

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class ContextCounts:
    """What followed each context of one length, as sorted codes with their counts."""

    grams: Codes  # context x 256 + next byte
    gram_counts: Codes
    contexts: Codes
    context_counts: Codes
    kinds: Codes  # different next bytes of each context


def _gram_codes(stream: ByteArray, order: int, first: int) -> Codes:
    """Code of the `order` bytes before each byte and the byte, for bytes `first` and on."""
    codes = np.zeros(len(stream) - first, np.int64)
    for back in range(order, -1, -1):
        codes = codes * 256 + stream[first - back : len(stream) - back]
    return codes


def _count(streams: Sequence[ByteArray], order: int) -> ContextCounts:
    """Counts over all streams; no context reaches from one stream into another."""
    codes = np.concatenate([_gram_codes(stream, order, order) for stream in streams])
    grams, gram_counts = np.unique(codes, return_counts=True)
    contexts, starts, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
    context_counts = np.add.reduceat(gram_counts, starts)
    return ContextCounts(grams, gram_counts, contexts, context_counts, kinds)


def _look_up(keys: Codes, values: Codes, wanted: Codes) -> Codes:
    """The value of each wanted key among sorted keys; 0 where the key is unknown."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


@dataclass(frozen=True)
class ByteNgram:
    """An interpolated byte model that sees `order` bytes back."""

    counts: tuple[ContextCounts, ...]

    @property
    def order(self) -> int:
        """How many bytes before the predicted one it sees."""
        return len(self.counts) - 1

    def bits(self, stream: ByteArray) -> NDArray[np.float64]:
        """Bits that each byte of `stream` costs, from byte `order` on: [len(stream) - order]."""
        probability = np.full(len(stream) - self.order, 1 / 256)
        for length, counts in enumerate(self.counts):
            grams = _gram_codes(stream, length, self.order)
            seen = _look_up(counts.grams, counts.gram_counts, grams)
            total = _look_up(counts.contexts, counts.context_counts, grams >> 8)
            kinds = _look_up(counts.contexts, counts.kinds, grams >> 8)
            known = total > 0
            mixed = (seen + kinds * probability)[known] / (total + kinds)[known]
            probability[known] = mixed
        bits: NDArray[np.float64] = -np.log2(probability)
        return bits

    def bits_per_byte(self, stream: ByteArray) -> float:
        """Mean of `bits`."""
        return float(self.bits(stream).mean())


def fit_ngram(streams: Sequence[ByteArray], order: int) -> ByteNgram:
    """Counts every context of 0 to `order` bytes in the streams. Cost: sorts of all their bytes."""
    return ByteNgram(tuple(_count(streams, length) for length in range(order + 1)))
