"""Annotation files of any size, local or remote, read piece by piece; and strict JSON."""

import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from data_tools.source import Corners
from data_tools.storage import SourceStore
from dpal.base.errors import DataError

PIECE = 2**22
LONGEST_VALUE = 2**26  # characters of one element of a JSON array
_BLANK = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"[-+.eE0-9]*")


class StoredFile(io.RawIOBase):
    """An object of a store as a seekable file; every read is a range of it."""

    def __init__(self, store: SourceStore, name: str) -> None:
        super().__init__()
        self._store, self._name, self._at = store, name, 0
        self._size = store.size(name)

    def readable(self) -> bool:
        """It is there to be read."""
        return True

    def seekable(self) -> bool:
        """Ranges begin anywhere."""
        return True

    def tell(self) -> int:
        """Bytes before the next that is read."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted from the start, from here or from the end."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there are bytes."""
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = self._store.get_range(self._name, self._at, length)
        self._at += length
        return length


def open_text(store: SourceStore, name: str) -> io.TextIOWrapper:
    """A stored UTF-8 text, with or without a byte order mark, line ends kept."""
    binary = io.BufferedReader(StoredFile(store, name), PIECE)
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def parse_json(text: str) -> Any:
    """Standard JSON alone (no NaN, no infinity). Raises ValueError otherwise."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def corners(numbers: Any, where: str) -> Corners:
    """Four finite numbers. Raises DataError otherwise; `where` says whose they are."""
    try:
        a, b, c, d = (float(number) for number in numbers)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: box {str(numbers)[:60]} is not four numbers") from None
    if not all(map(math.isfinite, (a, b, c, d))):
        raise DataError(f"{where}: box {numbers} is not finite")
    return a, b, c, d


def stream_object(text: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    """Members of a JSON object, the elements of its arrays one by one, each under its key.

    Memory is that of the largest element. Raises ValueError for anything but one JSON object.
    """
    window = _Window(text)
    window.expect("{")
    if window.next() == "}":
        window.take()
    else:
        while True:
            key = window.value()
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is no key")
            window.expect(":")
            if window.next() == "[":
                yield from ((key, element) for element in _elements(window))
            else:
                yield key, window.value()
            if window.take_one_of(",}") == "}":
                break
    if window.next():
        raise ValueError("text follows the object")


def _elements(window: "_Window") -> Iterator[Any]:
    window.expect("[")
    if window.next() == "]":
        window.take()
        return
    while True:
        yield window.value()
        if window.take_one_of(",]") == "]":
            return


class _Window:
    """The piece of a text that is being parsed, with where the parser is in it."""

    def __init__(self, text: io.TextIOBase) -> None:
        self._text, self._held, self._at = text, "", 0

    def next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = _skip(_BLANK, self._held, self._at)
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._more():
                return ""

    def take(self) -> str:
        character = self.next()
        self._at += 1
        return character

    def take_one_of(self, accepted: str) -> str:
        character = self.take()
        if not character or character not in accepted:
            raise ValueError(f"{character or 'the end'!r} where one of {accepted!r} is due")
        return character

    def expect(self, character: str) -> None:
        self.take_one_of(character)

    def value(self) -> Any:
        """The next whole value; more is read until it is whole."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                if len(self._held) - self._at > LONGEST_VALUE:
                    raise ValueError(f"a value of more than {LONGEST_VALUE} characters") from None
                if not self._more():
                    raise ValueError(error.msg) from None
                continue
            open_end = not isinstance(value, dict | list | str)  # a number may go on
            if open_end and _skip(_NUMBER, self._held, end) == len(self._held) and self._more():
                continue
            self._at = end
            return value

    def _more(self) -> bool:
        """Read at least as much again as is left, so that a long value is not parsed too often."""
        left = len(self._held) - self._at
        piece = self._text.read(max(PIECE, left))
        if not piece:
            return False
        self._held, self._at = self._held[self._at :] + piece, 0
        return True


def _skip(characters: re.Pattern[str], held: str, start: int) -> int:
    """The end of the run of such characters that begins at `start`."""
    found = characters.match(held, start)
    return found.end() if found else start


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
