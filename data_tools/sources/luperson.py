"""Pictures in an LMDB environment, as LUPerson and LUPerson-NL are published: key -> JPEG bytes.

Keys tell the video (`02_01_0003_00000004`: country, city, video, picture) and in LUPerson-NL the
video and its noisy identity (`00001_17_...`). The pickled list of keys beside the environment is
not read: the environment knows its keys. Values that are pickles are refused.

LMDB trusts its file: a length that does not fit is found out here, but a file made to do harm may
crash the process. Open only environments whose origin you trust.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_tools.source import Item
from data_tools.sources.catalogue import to_key, to_name
from data_tools.sources.persons import tagged
from data_tools.sources.whole_files import OpenFile, open_whole
from data_tools.storage import SourceStore
from dpal.base.errors import ConfigError, DataError

FILE = "data.mdb"
_LUPERSON = re.compile(rb"(?P<video>\d{2}_\d{2}_\d{4})_\d{8}$")
_LUPERSON_NL = re.compile(rb"(?P<video>\d{5})_(?P<identity>\d+)_")
_ABOUT = (b"__len__", b"__keys__", b"num-samples", b"length")
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


class LmdbSource:
    """Every value of an environment is an item; one of a remote environment's local copy.

    Raises:
        ConfigError: when the package `lmdb` is missing.
        DataError: when the environment is damaged or truncated.

    Attributes:
        left_out: number of values that describe the others, once items were read.
    """

    def __init__(self, store: SourceStore) -> None:
        self.url = store.url
        self.left_out: Counter[str] = Counter()
        self._where = f"{store.url}/{FILE}"
        self._file = open_whole(store, FILE)
        self._environment, self._version = _opened(self._file, self._where)

    def items(self) -> Iterator[Item]:
        """All values in the order of their keys. Raises DataError for damage, or a pickle."""
        self.left_out.clear()
        with _damage(self._where), self._environment.begin(buffers=True) as transaction:
            for held_key, value in transaction.cursor():
                key = bytes(held_key)
                if key in _ABOUT:
                    self.left_out["about the others"] += 1
                    continue
                if bytes(value[:2]) in _PICKLES:
                    raise DataError(
                        f"{self._where!r}: the value of key {to_name(key)!r} is a pickle, which "
                        "is never opened: accepted are the bytes of a JPEG or PNG"
                    )
                facts = _facts(key)
                version = tagged(self._version, facts)
                yield Item(to_name(key), to_name(key), len(value), version, None, facts)

    def read(self, picture: str) -> bytes:
        """The value of a key. Raises DataError when there is none."""
        with _damage(self._where), self._environment.begin() as transaction:
            value = transaction.get(to_key(picture))
        if value is None:
            raise DataError(f"{self._where!r} has no key {picture!r}")
        return bytes(value)


@contextmanager
def _damage(where: str) -> Iterator[None]:
    import lmdb

    try:
        yield
    except lmdb.Error as error:
        raise DataError(f"{where!r} is damaged: {error}") from None


def _facts(key: bytes) -> dict[str, str]:
    found = _LUPERSON.match(key) or _LUPERSON_NL.match(key)
    return {name: part.decode() for name, part in found.groupdict().items()} if found else {}


def _opened(file: OpenFile, where: str) -> tuple[Any, str]:
    """The environment, and what changes when it changes."""
    try:
        import lmdb
    except ImportError:
        raise ConfigError(
            f"{where!r}: reading an LMDB environment needs lmdb: `pip install 'dpal[sources]'`"
        ) from None
    try:
        environment = lmdb.open(
            file.path,
            subdir=False,
            readonly=True,
            create=False,
            lock=False,
            readahead=False,
            meminit=False,
        )
    except lmdb.Error as error:
        raise DataError(f"{where!r} is no LMDB environment that can be read: {error}") from None
    about = environment.info()
    # Reading a page beyond the end would kill the process.
    if (about["last_pgno"] + 1) * environment.stat()["psize"] > file.size:
        raise DataError(f"{where!r} is truncated: it has {file.size} bytes, its pages need more")
    return environment, f"{about['last_txnid']} {file.size}"
