"""What a comparison says in one sentence about the plan it is relative to.

A gain in balance is never called a gain in time: where balance decided, the sentence says so, and
what the step time does where sizes tell it. Knows rows of figures. Knows nothing of plans or
traces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

WORDS = {"step_time_us": "step time", "imbalance_mean": "imbalance", "peak_mean": "peak load"}


class Row(Protocol):
    """What is read of a `ComparisonRow`."""

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> float: ...
    @property
    def metric_high(self) -> float: ...
    @property
    def change_percent(self) -> float: ...
    @property
    def change_low_percent(self) -> float: ...
    @property
    def change_high_percent(self) -> float: ...
    @property
    def better(self) -> bool: ...
    @property
    def indistinguishable(self) -> bool: ...
    @property
    def transfers(self) -> float | None: ...
    @property
    def transfers_change_percent(self) -> float | None: ...
    @property
    def transfers_change_low_percent(self) -> float | None: ...
    @property
    def transfers_change_high_percent(self) -> float | None: ...


def verdict_of(
    rows: Sequence[Row], reference: str, metric: str, transfers_name: str, slack: float,
    step_us: Mapping[str, float],
) -> str:
    """One sentence. rows: best first. slack: of imbalance, within which transfers decide.

    step_us: each plan's step time; empty where sizes are not known.
    """
    best, what = rows[0], WORDS[metric]
    own = next(row for row in rows if row.name == reference)
    if len(rows) == 1:
        return f"{reference}: {what} {metric_text(best.metric, metric)}"
    if math.isinf(own.metric_high):
        return (
            f"not enough data: {best.name} came out best "
            f"({what} {metric_text(best.metric, metric)}), but so few requests cannot tell how "
            "far that may be off: record more requests"
        )
    if best.name == reference:
        return _reference_is_best(rows, metric, transfers_name, slack)
    gain = _gain_text(own, best, metric, transfers_name, slack)
    if not best.better:
        change, reach = deciding(own, best, slack)
        return (
            f"{reference} is fine here: the gain of {best.name}, {-change:.1f} %, is below the "
            f"noise of {reach:.1f} %"
        )
    others = [row.name for row in rows[1:] if row.indistinguishable and row.name != reference]
    also = f"; {', '.join(others)} cannot be told apart from it" if others else ""
    unlike_time = _time_beside(own.name, best.name, metric, step_us)
    flatter = metric != "step_time_us" and not _transfers_decide(own, best, slack)
    verb = "balances better than" if flatter else "is better than"
    return f"{best.name} {verb} {reference}: {gain}{unlike_time}{also}"


def metric_text(value: float, metric: str) -> str:
    """The metric with its unit."""
    return f"{value:,.0f} us" if metric == "step_time_us" else f"{value:.3f}"


def _time_beside(own: str, best: str, metric: str, step_us: Mapping[str, float]) -> str:
    """What a gain of anything but time is in time."""
    if metric == "step_time_us":
        return ""
    if own not in step_us or best not in step_us:
        return "; this is balance, not time"
    change = (step_us[best] / step_us[own] - 1) * 100
    return (
        f"; this is balance, not time: step time {metric_text(step_us[own], 'step_time_us')} -> "
        f"{metric_text(step_us[best], 'step_time_us')} ({change:+.1f} %)"
    )


def _reference_is_best(
    rows: Sequence[Row], metric: str, transfers_name: str, slack: float
) -> str:
    own, second = rows[0], rows[1]
    if second.indistinguishable:
        return f"{own.name} is fine here: {second.name} cannot be told apart from it"
    text = f"{own.name} is best: {WORDS[metric]} {metric_text(own.metric, metric)}"
    if _transfers_decide(own, second, slack):
        return (
            f"{text}, {transfers_name} per token {own.transfers:.3f}; {second.name} makes "
            f"{second.transfers_change_percent:.1f} % more of them"
        )
    return f"{text}; {second.name} is {second.change_percent:.1f} % worse"


def _transfers_decide(one: Row, other: Row, slack: float) -> bool:
    """Whether these two are equal but for their transfers."""
    if one.transfers is None or other.transfers is None:
        return False
    return abs(one.metric - other.metric) <= slack and one.transfers != other.transfers


def deciding(own: Row, best: Row, slack: float) -> tuple[float, float]:
    """(change in per cent of what decides, reach of its band)."""
    low, high = best.transfers_change_low_percent, best.transfers_change_high_percent
    if _transfers_decide(own, best, slack):
        assert best.transfers_change_percent is not None and low is not None and high is not None
        return best.transfers_change_percent, (high - low) / 2
    return best.change_percent, (best.change_high_percent - best.change_low_percent) / 2


def _gain_text(own: Row, best: Row, metric: str, transfers_name: str, slack: float) -> str:
    change, reach = deciding(own, best, slack)
    band = f"({change:+.1f} % ± {reach:.1f})"
    figures = (
        f"{WORDS[metric]} {metric_text(own.metric, metric)} -> {metric_text(best.metric, metric)}"
    )
    if best.transfers is None:
        return f"{figures} {band}"
    transfers = f"{transfers_name} per token {own.transfers:.3f} -> {best.transfers:.3f}"
    if _transfers_decide(own, best, slack):
        return f"{transfers} {band} at {figures}"
    return f"{figures} {band}, {transfers}"
