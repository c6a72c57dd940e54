"""Documents: plain values or one line that says where; never the last of two, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from loadmaster.errors import InputError
from loadmaster.foundation.documents import (
    MOST_NESTED,
    first_fault,
    parse_json,
    parse_yaml,
    read_json,
    read_mapping,
    read_yaml,
)

Reader = Callable[[Path], Any]
BOTH = pytest.mark.parametrize("read", [read_json, read_yaml])


def refused(parse: Callable[[str, str], Any], text: str) -> str:
    """What is said of a text that is refused: one line of bearable length, the place first."""
    with pytest.raises(InputError) as caught:
        parse(text, "here")
    said = str(caught.value)
    assert said.startswith("here: ") and "\n" not in said and len(said) < 400
    return said


@BOTH
@pytest.mark.parametrize(("text", "place"), [
    ('{"a": 1, "a": 2}', "'a' is given twice"),
    ('{"x": [{"deep": {"b": 1, "b": 1}}]}', "'b' is given twice"),
    ('{"x": 1, "' + "k" * 900 + '": 1, "' + "k" * 900 + '": 2}', "k…' is given twice"),
])
def test_a_key_given_twice_is_refused(
    read: Reader, text: str, place: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(InputError, match=place) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: not ") and len(str(caught.value)) < 300


def test_yaml_says_the_line_of_the_second_key() -> None:
    assert "line 3, column 1: the key 'nodes' is given twice" in refused(
        parse_yaml, "nodes: 1\nload: 2\nnodes: 3\n"
    )


@pytest.mark.parametrize("text", ["1: a\n1.0: b", "true: a\nyes: b", "0x10: a\n16: b"])
def test_yaml_keys_that_are_one_value_are_one_key(text: str) -> None:
    assert "is given twice" in refused(parse_yaml, text)


def test_a_key_beside_a_merge_replaces_the_merged_one() -> None:
    text = "x: &d {node: 0, slots: 2}\ny: {<<: *d, node: 1}\nz: {<<: *d}\nw: {node: 3, <<: *d}"
    assert parse_yaml(text, "here") == {
        "x": {"node": 0, "slots": 2}, "y": {"node": 1, "slots": 2},
        "z": {"node": 0, "slots": 2}, "w": {"node": 3, "slots": 2},
    }


@pytest.mark.parametrize("text", [
    "<<: {a: 1, a: 2}", "y: {<<: {a: 1}, b: 1, b: 2}", "x: &d {a: 1}\ny: {<<: *d, <<: *d}",
    "!!set {a, a}",
])
def test_merging_hides_no_second_key(text: str) -> None:
    assert "is given twice" in refused(parse_yaml, text)


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]"])
def test_json_has_neither_nan_nor_infinity(text: str) -> None:
    assert "is no number" in refused(parse_json, text)
    parse_json(text, "here", finite=False)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_no_json_and_is_nothing_in_yaml(text: str) -> None:
    assert "it is empty" in refused(parse_json, text)
    assert parse_yaml(text, "here") is None


def test_a_byte_order_mark_is_named_in_json_and_means_nothing_in_yaml() -> None:
    assert "byte order mark" in refused(parse_json, "\ufeff{}")
    assert parse_yaml("\ufeffa: 1", "here") == {"a": 1}


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_whole_numbers_of_any_use_are_kept_and_endless_ones_refused(parse: Any) -> None:
    assert parse(f"[{10**30}]", "here") == [10**30]
    assert "more digits than can be read" in refused(parse, f"[{'9' * 5000}]")


@BOTH
def test_what_is_no_utf8_is_named_with_its_place(read: Reader, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match=f"{path}: cannot be read as text: byte 7 is not UTF-8"):
        read(path)
    path.write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(InputError, match="byte 0 is not UTF-8"):
        read(path)


@BOTH
def test_what_is_no_file_is_named(read: Reader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no such file"):
        read(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be read: a folder, not a file"):
        read(tmp_path)


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
@pytest.mark.parametrize("open, close", [("[", "]"), ('{"a": ', "}")])
def test_nesting_has_a_bound(parse: Any, open: str, close: str) -> None:
    def nested(levels: int) -> str:
        return open * levels + "0" + close * levels

    parse(nested(MOST_NESTED), "here")
    for levels in (MOST_NESTED + 1, 900, 50_000):
        said = refused(parse, nested(levels))
        assert "nested too deeply" in said or "maximum nesting depth" in said


@pytest.mark.parametrize("text", [
    "&a [*a]",
    "a: &a {b: *a}",
    "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
])
def test_aliases_do_not_go_round_the_bound(text: str) -> None:
    assert "nested too deeply" in refused(parse_yaml, text)


def test_a_short_yaml_that_stands_for_a_huge_one_is_refused() -> None:
    tens = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20))
    assert "aliases repeat" in refused(parse_yaml, "a0: &a0 [0, 0]\n" + tens)


@pytest.mark.parametrize("text", [
    "a: [", "a\x07: 1", "x: 2020-99-99", "!!int ''", "!!bool q", "!!timestamp q", "? [1]\n: 2",
    "&a {*a : 1}", "!!python/object/apply:os.getcwd []", "!!binary x", "--- 1\n--- 2",
])
def test_what_is_no_plain_yaml_is_one_line(text: str) -> None:
    assert "not YAML" in refused(parse_yaml, text)


@pytest.mark.parametrize(("text", "found"), [("- 1", "a list"), ("", "empty"), ("7", "a int")])
def test_a_list_where_a_mapping_belongs_is_named(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"a grid file is a mapping with `base`; this is {found}"):
        read_mapping(path, "grid", "`base`")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc<=~é "), inner),
    max_leaves=20,
)


@given(VALUES)
def test_strict_reading_reads_what_the_libraries_wrote(value: Any) -> None:
    assert parse_json(json.dumps(value), "here") == value
    assert parse_yaml(yaml.safe_dump(value), "here") == value


@given(st.text(st.sampled_from("{}[]&*a1:,-? <!'\"\n\t#|"), max_size=30))
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    """And never another value than the library's own."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for parse, library in ((parse_json, json.loads), (parse_yaml, lambda t: yaml.load(t, loader))):
        try:
            found = parse(text, "here")
        except InputError as error:
            assert str(error).startswith("here: ") and "\n" not in str(error)
            continue
        assert repr(found) == repr(library(text))


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rows: list[_Inner]
    name: str = ""

    @model_validator(mode="after")
    def _named(self) -> _Shape:
        if self.name == "bad":
            raise ValueError("name must not\nbe bad")
        return self


@pytest.mark.parametrize(("fields", "said"), [
    ({"rows": [{"size": 1}, {"size": "x"}]}, "rows.1.size: Input should be a valid integer, unable "
     "to parse string as an integer"),
    ({"rows": [], "colour": 1}, "colour: no such field; there are: rows, name"),
    ({"rows": [{"size": 1, "colour": 1}]}, "rows.0.colour: no such field"),
    ({"rows": [], "a\nb": 1}, "a b: no such field; there are: rows, name"),
    ({"rows": [], "name": "bad"}, "name must not be bad"),
    ({"rows": [], "k" * 900: 1}, f"{'k' * 59}…: no such field; there are: rows, name"),
    ([], "Input should be a valid dictionary or instance of _Shape"),
])
def test_the_first_fault_is_field_and_reason_in_one_line(fields: Any, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Shape.model_validate(fields)
    assert first_fault(caught.value, "rows, name") == said
