"""What a survey has found so far: items, verdicts and rejects, on disk instead of in memory.

A temporary SQLite database that nobody else can open: the operating system removes it when the
process ends, however it ends. It lies in the folder of temporary files (`TMPDIR`). Whatever must
outlive a killed process lies in the destination instead (data_tools/ingest.py).
"""

import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from data_tools.ledger_rows import (
    Found,
    Reject,
    Sample,
    found_of,
    item_row,
    sample_of,
    to_blob,
    to_text,
)
from data_tools.near_duplicates import find_alike
from data_tools.policy import Kept, Reason, Refused, Verdict
from data_tools.spool import Spool
from dpal.base.errors import StorageError

CACHE_KIB = 8_192
TRAIN, VALIDATION = 0, 1

_TABLES = (
    "items(n INTEGER PRIMARY KEY, source INT, name BLOB, picture BLOB, size INT, version TEXT,"
    " box TEXT, facts TEXT)",
    "judged(n INTEGER PRIMARY KEY, part INT, key TEXT, kind TEXT, size INT, height INT,"
    " width INT, facts TEXT, look INT)",
    "rejects(source BLOB, reason TEXT, detail BLOB)",
    "kept(key TEXT PRIMARY KEY, n INT) WITHOUT ROWID",
    "spooled(key TEXT PRIMARY KEY, start INT) WITHOUT ROWID",
)


class Ledger:
    """Items in order, what became of them, and what is kept, by key; for one thread.

    Args:
        urls: of the sources, by their index.

    Attributes:
        spool: bytes of samples that were made; what is added there is found by `samples`.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = tuple(urls)
        self.spool = Spool()
        with _errors():
            self._db = sqlite3.connect("", isolation_level=None)  # "": temporary, on disk
            for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
                self._db.execute(f"PRAGMA {pragma}")
            for table in _TABLES:
                self._db.execute(f"CREATE TABLE {table}")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._db.close()
        self.spool.close()

    def add_items(self, found: Iterable[Found]) -> int:
        """Append items, in order; return how many they were."""
        before = self.num_items
        with self._batch():
            self._db.executemany(
                "INSERT INTO items(source, name, picture, size, version, box, facts)"
                " VALUES(?, ?, ?, ?, ?, ?, ?)",
                (item_row(one) for one in found),
            )
        return self.num_items - before

    @property
    def num_items(self) -> int:
        """Items added."""
        with _errors():
            return int(self._db.execute("SELECT COALESCE(MAX(n), 0) FROM items").fetchone()[0])

    def slices(self, length: int) -> Iterator[tuple[int, list[Found]]]:
        """Items in order, `length` at once, with the number of the first."""
        for first in range(1, self.num_items + 1, length):
            with _errors():
                rows = self._db.execute(
                    "SELECT source, name, picture, size, version, box, facts FROM items"
                    " WHERE n >= ? AND n < ? ORDER BY n",
                    (first, first + length),
                ).fetchall()
            yield first, [found_of(row) for row in rows]

    def add_verdicts(
        self, first: int, found: Sequence[Found], verdicts: Sequence[Verdict], parts: Sequence[int]
    ) -> None:
        """Enter the verdicts on `found`, the items from number `first` on.

        Args:
            parts: TRAIN or VALIDATION, where each belongs if it is kept.
        """
        rows = list(zip(range(first, first + len(found)), found, verdicts, parts, strict=True))
        with self._batch():
            self._db.executemany("INSERT OR IGNORE INTO spooled VALUES(?, ?)", self.spool.drain())
            self._db.executemany(
                "INSERT INTO judged(n, part, key, kind, size, height, width, facts, look)"
                " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(n, part, *kept) for n, _one, kept, part in rows if isinstance(kept, Kept)],
            )
            self._reject(
                Reject(self._place(one.source, one.item.name), *refused)
                for _n, one, refused, _part in rows
                if isinstance(refused, Refused)
            )

    def keep_each_key_once(self) -> None:
        """Of equal bytes keep the first item; the others become rejects."""
        with self._batch():
            self._db.execute("INSERT OR IGNORE INTO kept SELECT key, n FROM judged ORDER BY key, n")
            rows = self._rows(
                "SELECT i.source, i.name, o.source, o.name FROM judged j JOIN kept k USING(key)"
                " JOIN items i ON i.n = j.n JOIN items o ON o.n = k.n WHERE j.n != k.n"
            )
            self._reject(
                Reject(
                    self._place(source, to_text(name)),
                    "duplicate",
                    f"same bytes as {self._place(other, to_text(other_name))}",
                )
                for source, name, other, other_name in rows
            )

    def drop_alike(self, distance: int) -> None:
        """Leave out what looks like a better image (data_tools/near_duplicates.py)."""
        with _errors():
            self._db.execute("CREATE TABLE looks(key TEXT, pixels INT, look INT)")
            self._db.execute(
                "INSERT INTO looks SELECT k.key, j.height * j.width, j.look"
                " FROM kept k JOIN judged j USING(n)"
            )
            alike = find_alike(self._db, distance)
        with self._batch():
            for one in alike:
                source, name = self._db.execute(
                    "SELECT i.source, i.name FROM kept k JOIN items i USING(n) WHERE k.key = ?",
                    (one.key,),
                ).fetchone()
                detail = f"{one.distance} of 64 bits differ from {one.kept}, which is kept"
                self._reject([Reject(self._place(source, to_text(name)), "near_duplicate", detail)])
                self._db.execute("DELETE FROM kept WHERE key = ?", (one.key,))

    def num_samples(self, part: int | None = None) -> int:
        """Samples kept, in one part or in all."""
        where = "" if part is None else f"WHERE part = {int(part)}"
        with _errors():
            row = self._db.execute(
                f"SELECT COUNT(*) FROM kept JOIN judged USING(n) {where}"
            ).fetchone()
        return int(row[0])

    def samples(self, part: int, count: int) -> Iterator[list[Sample]]:
        """What is kept in `part`, by key, `count` at once."""
        with _errors(), closing(self._db.cursor()) as cursor:
            cursor.execute(
                "SELECT k.key, i.name, i.source, i.picture, i.box, j.kind, j.size, j.height,"
                " j.width, j.facts, COALESCE(s.start, -1)"
                " FROM kept k JOIN judged j USING(n) JOIN items i USING(n)"
                " LEFT JOIN spooled s ON s.key = k.key WHERE j.part = ? ORDER BY k.key",
                (part,),
            )
            while rows := cursor.fetchmany(count):
                yield [sample_of(row) for row in rows]

    @property
    def counts(self) -> tuple[tuple[Reason, int], ...]:
        """Number of rejects by reason, sorted by reason."""
        return tuple(
            self._rows("SELECT reason, COUNT(*) FROM rejects GROUP BY reason ORDER BY reason")
        )

    def rejects(self) -> Iterator[Reject]:
        """All rejects, sorted."""
        rows = self._rows("SELECT source, reason, detail FROM rejects ORDER BY 1, 2, 3")
        return (Reject(to_text(row[0]), row[1], to_text(row[2])) for row in rows)

    def _place(self, source: int, name: str) -> str:
        """An item as a user would name it."""
        return f"{self._urls[source]}/{name}"

    def _reject(self, rejects: Iterable[Reject]) -> None:
        self._db.executemany(
            "INSERT INTO rejects VALUES(?, ?, ?)",
            ((to_blob(one.source), one.reason, to_blob(one.detail)) for one in rejects),
        )

    def _rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        with _errors(), closing(self._db.cursor()) as cursor:
            yield from cursor.execute(query)

    @contextmanager
    def _batch(self) -> Iterator[None]:
        """One transaction: an insert costs a hundredth of one on its own."""
        with _errors():
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        folder = os.environ.get("SQLITE_TMPDIR", tempfile.gettempdir())
        raise StorageError(
            f"cannot keep the list of images in temporary files of {folder!r}: {error}; set TMPDIR "
            "to a folder with room"
        ) from None
