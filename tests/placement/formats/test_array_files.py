"""Files of arrays that are none: the error gives the library's own reason, in one line."""


from pathlib import Path

import pytest

from loadmaster.errors import InputError
from loadmaster.placement.formats.array_files import read_npy, whole_array

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


@pytest.mark.parametrize("header", [
    b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, (3), }",     # brackets left open
    b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }",          # objects
    b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999, 2), }",
])
def test_a_broken_header_is_one_line_and_advises_nothing_unsafe(
    header: bytes, tmp_path: Path
) -> None:
    whole = header.ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(whole).to_bytes(2, "little") + whole + bytes(32)
    )
    with pytest.raises(InputError, match=r"a\.npy: not numpy's") as caught:
        read_npy(tmp_path / "a.npy")
    assert len(str(caught.value).splitlines()) == 1
    assert "unsafely" not in str(caught.value) and "pickle.load" not in str(caught.value)
