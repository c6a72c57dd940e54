"""What goes into JSON is JSON, whatever it was."""

from __future__ import annotations

import json
import math

import numpy as np

from loadmaster.foundation.plain_values import plain


def test_arrays_tuples_keys_and_what_json_does_not_have() -> None:
    value = {1: (np.float32(0.5), np.arange(2)), "nan": math.nan, "deep": [{"inf": np.inf}]}
    found = plain(value)
    assert found == {"1": [0.5, [0, 1]], "nan": None, "deep": [{"inf": None}]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
