"""Files of arrays that are none: the error gives the library's own reason, in one line."""


import pytest

from loadmaster.errors import InputError
from loadmaster.placement.formats.array_files import whole_array

TORN = "a wall\nof text"


def test_the_reason_of_a_refused_array_is_kept_in_one_line() -> None:
    class Torn:
        def __array__(self, dtype: object = None, copy: object = None) -> None:
            raise ValueError(TORN)

    with pytest.raises(InputError, match=r"^here: no array of numbers: a wall of text$"):
        whole_array(Torn(), "slots", "here")


def test_a_refusal_without_a_reason_names_its_kind() -> None:
    class Silent:
        def __array__(self, dtype: object = None, copy: object = None) -> None:
            raise ValueError

    with pytest.raises(InputError, match=r"^here: no array of numbers: ValueError$"):
        whole_array(Silent(), "slots", "here")
