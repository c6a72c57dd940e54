"""What a recorder's file holds as arrays and whole numbers, each fault in one line.

Knows torch's tensors by what they can do, not by import. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError


def as_array(value: Any, where: str) -> npt.NDArray[Any]:
    """A tensor, array or nested list as an array. Raises InputError on anything else.

    Floating tensors become float64 (numpy has no bfloat16), sparse ones dense.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().to_dense()
            value = value.double() if value.is_floating_point() else value
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where} is no array of numbers: {str(error).splitlines()[0]}") from error
    if array.dtype.kind not in "iuf":
        raise InputError(f"{where} is no array of numbers, but {type(value).__name__}")
    return array


def as_whole(value: Any, where: str) -> int:
    """A whole number of at most 63 bits. Raises InputError on anything else."""
    try:
        number = int(value)
        if isinstance(value, str) or number != value or abs(number) >= 2**63:
            raise ValueError
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{where} {str(value)[:40]!r} is not a whole number") from None
    return number
