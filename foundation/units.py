"""Figures for people: times, sizes, shares and counts in the unit an engineer would say.

Three significant digits, so that a column of them can be read down. Knows numbers only.
"""

from __future__ import annotations

import math

_TIMES = ((1e-3, "ns"), (1.0, "us"), (1e3, "ms"), (1e6, "s"), (60e6, "min"), (3600e6, "h"))
_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")
NOTHING = "-"


def duration(us: float | None) -> str:
    """A time given in microseconds: `412 us`, `28.5 ms`, `1.20 s`, `14.3 min`."""
    if us is None or not math.isfinite(us):
        return NOTHING
    if us == 0:
        return "0 s"
    unit_us, unit = next(
        (pair for pair in reversed(_TIMES) if abs(us) >= pair[0] * 0.9995), _TIMES[0]
    )
    return f"{digits(us / unit_us)} {unit}"


def size(num_bytes: float | None) -> str:
    """Bytes in powers of 1000: `312 B`, `17.7 MB`."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return NOTHING
    power = 0
    while abs(num_bytes) >= 999.5 and power < len(_SIZES) - 1:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{round(num_bytes)} B" if power == 0 else f"{digits(num_bytes)} {_SIZES[power]}"


def percent(share: float | None) -> str:
    """A share of one in per cent: `12.5 %`."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def change(value_percent: float, low: float, high: float) -> str:
    """A change in per cent with the reach of its band: `-4.2 ± 0.6 %`; `± ?` where it has none."""
    reach = (high - low) / 2
    known = f"{reach:.1f}" if math.isfinite(reach) else "?"
    return f"{value_percent:+.1f} ± {known} %"


def digits(value: float | None) -> str:
    """Three significant digits or whole numbers, thousands grouped; an exponent at either end."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    rounded = round(value, max(0, 2 - math.floor(math.log10(abs(value)))))
    if not 1e-4 <= abs(rounded) < 1e12:
        return f"{value:.2e}"
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
