"""Layers as text: what people write on a command line, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.traces.model_config.layer_ranges import parse_layers, written


@pytest.mark.parametrize(("text", "layers"), [
    ("3-6", (3, 4, 5, 6)), ("0,2,4", (0, 2, 4)), ("1-7/2", (1, 3, 5, 7)), ("5", (5,)),
    (" 8 - 9, 1 ", (1, 8, 9)), ("0-2,7-9/2", (0, 1, 2, 7, 9)),
])
def test_numbers_ranges_and_steps(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "3-", "-3", "6-3", "a", "1,1", "1-5/0", "0-999999", "3..9"])
def test_anything_else_is_one_line_that_shows_how(text: str) -> None:
    with pytest.raises(InputError, match="layers") as caught:
        parse_layers(text)
    assert "\n" not in str(caught.value)


@given(st.sets(st.integers(0, 300), min_size=1, max_size=60))
def test_what_is_written_is_read_back(layers: set[int]) -> None:
    assert parse_layers(written(sorted(layers))) == tuple(sorted(layers))


def test_runs_are_written_short() -> None:
    assert written(range(3, 61)) == "3-60"
    assert written(range(1, 48, 2)) == "1-47/2"
    assert written([0, 2, 5, 6, 7]) == "0,2,5-7"
