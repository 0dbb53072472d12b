"""JSON piece by piece says what JSON in one piece says; stored files seek as files do."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.sources import text
from data_tools.sources.text import StoredFile, open_text, stream_object
from data_tools.storage import LocalStore

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32)
)
VALUES = st.recursive(
    SCALARS.filter(lambda x: not isinstance(x, float) or abs(x) < 1e30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(autouse=True)
def _small_pieces() -> Iterator[None]:
    before, text.PIECE = text.PIECE, 5
    yield
    text.PIECE = before


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=5), st.sampled_from([None, 0, 3]))
def test_members_are_those_of_the_whole_object(values: dict[str, Any], indent: int | None) -> None:
    expected = []
    for key, value in values.items():
        elements = value if isinstance(value, list) else [value]
        expected += [(key, element) for element in elements]
    whole = json.dumps(values, indent=indent, ensure_ascii=False)
    assert list(stream_object(io.StringIO(whole))) == expected


@pytest.mark.parametrize(
    "broken",
    [
        *("", "[]", "{", '{"a"', '{"a":', '{"a":1', '{"a":[1', '{"a":[1,]}', '{"a":[1 2]}'),
        *('{"a":1}x', "{1:2}", '{"a" 1}', '{"a":[NaN]}', '{"a":Infinity}', '{"a":tru}'),
        '{"a":' + "[" * 100_000,
    ],
)
def test_what_is_no_object_is_a_value_error(broken: str) -> None:
    with pytest.raises(ValueError):
        list(stream_object(io.StringIO(broken)))


def test_a_number_at_the_end_of_a_piece_is_read_to_its_end() -> None:
    assert list(stream_object(io.StringIO('{"a":123456789,"b":[12345678, 9.5e3]}'))) == [
        ("a", 123456789),
        ("b", 12345678),
        ("b", 9500.0),
    ]
    assert list(stream_object(io.StringIO('{"": -0.0}'))) == [("", 0.0)]  # "-0." ends a piece


def test_a_stored_file_reads_and_seeks_as_a_file_on_disk(tmp_path: Path) -> None:
    contents = bytes(range(256)) * 5
    (tmp_path / "f").write_bytes(contents)
    stored = io.BufferedReader(StoredFile(LocalStore(tmp_path), "f"), 64)
    plain = io.BytesIO(contents)
    for offset, whence, length in [
        (0, 0, 10),
        (-7, 2, 20),
        (1000, 0, 400),
        (-5, 1, 3),
        (9999, 0, 4),
    ]:
        assert stored.seek(offset, whence) == plain.seek(offset, whence)
        assert stored.read(length) == plain.read(length)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfa\r\nb")
    with open_text(LocalStore(tmp_path), "f") as file:
        assert file.read() == "a\r\nb"
