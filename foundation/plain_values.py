"""Values of ours as JSON has them.

Knows containers, arrays and numbers. Knows nothing of what they mean.
"""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """Dicts with texts for keys, lists for tuples and arrays; NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
