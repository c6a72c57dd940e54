"""Which interval is used where, and why; and what the kinds have in common.

All are of CONFIDENCE, on both sides unless they say otherwise. They differ in what is independent
of what:

- Plans on the steps of one trace in which requests turn over many times (`noise_band.mean_noise`,
  in `compare`): neighbouring steps share their requests, and requests come and go. A model of
  requests' effects, fitted to the steps, draws new requests: it needs no more steps than there are.
- The same where they turn over less, and what a search gains on requests it has not seen
  (`bootstrap`, in `compare` and in rebalancing): steps cannot tell how other requests would do, so
  the requests themselves are drawn again and cut into steps anew. A draw has fewer steps than were
  judged, and what single steps scatter more for that is taken off; requests of unequal length
  count as fewer of equal length where they widen the band.
- Both are of a level (how other requests of the kind would do) or of a change in per cent, which is
  a ratio: other requests move both plans, so its band is not that of the gap over a fixed whole.
  `benchmarks/field_coverage.py` counts how often they hold on real routing.
- Plans that served the same requests in simulation (`simulator/serving/paired_difference`): what
  makes a request long cancels pair by pair, but neighbours queue behind one another. Whole
  stretches of requests, as long as what is in flight, are drawn again: a circular block bootstrap.
- The same prompts served live under two plans or settings (`workers/demo/measure`): tens of pairs,
  each soon after the other, nearly independent: Student's t on the logarithms of their ratios.
- Means of hundreds of pairs, or of tens of long batches, in benchmarks (live agreement, queues):
  NORMAL_REACH standard errors; Student's t would be at most 5 % wider there.

Whether two loads differ by more than chance is no interval but a test: `traces/analysis/drift`
deals blocks of requests anew. Knows numbers alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...foundation.arrays import FloatArray

CONFIDENCE = 0.95
BOTH_SIDES = (1.0 + CONFIDENCE) / 2      # the quantile that a two-sided interval ends at
NORMAL_REACH = 1.96                      # standard errors of a normal law to that quantile


def band(centre: float, noise_B: Any) -> tuple[float, float]:
    """Central band around `centre`, symmetric; infinite where the noise cannot be told (None).

    noise_B: [B] draws of how far a mean like this lies from the true one.
    """
    if noise_B is None:
        return -np.inf, np.inf
    reach = float(np.quantile(np.abs(noise_B), CONFIDENCE))
    return float(centre) - reach, float(centre) + reach


def few_draws_factor(n: float, freedom: float | None = None) -> float:
    """How much wider a bootstrap of n units must be; n > 1.

    The bootstrap of n spreads sqrt((n - 1) / n) too little, and a band of two normal standard
    deviations should be one of Student's with n - 1 degrees of freedom; fewer (`freedom`) where the
    units' effects have longer tails than a normal law, so that n of them tell a spread less well.
    """
    from scipy.stats import norm, t  # slow to import

    freedom = n - 1 if freedom is None else freedom
    return float(np.sqrt(n / (n - 1)) * t.ppf(BOTH_SIDES, freedom) / norm.ppf(BOTH_SIDES))


def standard_error(value_N: FloatArray) -> float:
    """Of the mean of independent values, at least two."""
    return float(np.std(value_N, ddof=1)) / float(np.sqrt(len(value_N)))


def t_reach(value_N: FloatArray, quantile: float = BOTH_SIDES) -> float:
    """How far the mean of independent values may be off, up to a quantile of Student's t."""
    from scipy.stats import t  # slow to import

    return float(t.ppf(quantile, len(value_N) - 1)) * standard_error(value_N)
