"""Near duplicates: which images look like a better one, found without comparing all pairs.

Looks are 64-bit perceptual hashes; two images are alike when at most `distance` bits differ. The
images are taken from best to worst (more pixels first, then the smaller key): one is kept unless
it is alike to one that is kept already. So the outcome does not depend on the order of sources.

Alike pairs are found by bands: of `distance + 2` bands at least two are equal in both hashes, so
it is enough to compare within buckets of two equal bands, one pass for each choice of two.
"""

import sqlite3
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np

BITS = 64
ROWS = 65_536  # read at once

Hashes = np.ndarray[Any, np.dtype[np.int64]]


class Alike(NamedTuple):
    """An image that looks like a better one.

    Attributes:
        key: of the image.
        kept: key of the better one, which is kept.
        distance: bits in which they differ.
    """

    key: str
    kept: str
    distance: int


def find_alike(db: sqlite3.Connection, distance: int) -> Iterator[Alike]:
    """Images of table `looks` to leave out, by key.

    Args:
        db: holds `looks(key TEXT, pixels INTEGER, look INTEGER)`; more tables are made in it.
        distance: bits that may differ, 1 and more.
    """
    db.execute("CREATE TABLE ranked(rank INTEGER PRIMARY KEY, look INTEGER, key TEXT)")
    db.execute(
        "INSERT INTO ranked(look, key) SELECT look, key FROM looks ORDER BY pixels DESC, key"
    )
    # One row for each look, its best image: the others of that look share the fate of their look.
    db.execute("CREATE TABLE best(look INTEGER PRIMARY KEY, rank INTEGER) WITHOUT ROWID")
    db.execute("INSERT OR IGNORE INTO best SELECT look, rank FROM ranked ORDER BY look, rank")
    db.execute(
        "CREATE TABLE pairs(worse INT, better INT, PRIMARY KEY(worse, better)) WITHOUT ROWID"
    )
    for bands in combinations(_bands(distance + 2), 2):
        for pairs in _pairs_of_pass(db, bands, distance):
            db.execute("BEGIN")
            db.executemany("INSERT OR IGNORE INTO pairs VALUES(?, ?)", pairs)
            db.execute("COMMIT")
    db.execute("CREATE TABLE gone(rank INTEGER PRIMARY KEY, kept INTEGER)")
    _take_from_best_to_worst(db)
    rows = db.execute(
        "SELECT r.key, k.key, r.look, k.look FROM ranked r JOIN best b USING(look)"
        " LEFT JOIN gone g ON g.rank = b.rank JOIN ranked k ON k.rank = COALESCE(g.kept, b.rank)"
        " WHERE g.rank IS NOT NULL OR b.rank != r.rank ORDER BY r.rank"
    )
    return (
        Alike(key, kept, ((one ^ other) & (2**BITS - 1)).bit_count())
        for key, kept, one, other in rows
    )


def _bands(count: int) -> list[tuple[int, int]]:
    """First bit and width of bands that cover all bits."""
    edges = [BITS * number // count for number in range(count + 1)]
    return [(low, high - low) for low, high in pairwise(edges)]


def _pairs_of_pass(
    db: sqlite3.Connection, bands: tuple[tuple[int, int], tuple[int, int]], distance: int
) -> Iterator[list[tuple[int, int]]]:
    """Pairs (worse, better) of one bucket, by chunks that end where a bucket ends."""
    (low, width), (other_low, other_width) = bands
    bucket = (
        f"(((look >> {low}) & {2**width - 1}) << {other_width})"
        f" | ((look >> {other_low}) & {2**other_width - 1})"
    )
    rows = db.cursor().execute(f"SELECT {bucket} AS bucket, look, rank FROM best ORDER BY bucket")
    left: list[tuple[int, int, int]] = []
    while chunk := rows.fetchmany(ROWS):
        chunk = left + chunk
        last = chunk[-1][0]
        end = len(chunk)
        while end and chunk[end - 1][0] == last:
            end -= 1
        yield _alike_rows(chunk[:end], distance)
        left = chunk[end:]
    yield _alike_rows(left, distance)


def _alike_rows(rows: list[tuple[int, int, int]], distance: int) -> list[tuple[int, int]]:
    """Alike pairs among rows (bucket, look, rank), sorted by bucket; as (worse, better) ranks."""
    if len(rows) < 2:
        return []
    columns: Hashes = np.array(rows, dtype=np.int64).T
    bucket, looks, ranks = np.ascontiguousarray(columns)  # [rows] each
    found: list[tuple[int, int]] = []
    first = np.arange(len(rows) - 1)
    step = 1
    # Every row with the one `step` further on, while some bucket is that long.
    while len(first := first[first + step < len(rows)]):
        first = first[bucket[first] == bucket[first + step]]
        bits = np.bitwise_count((looks[first] ^ looks[first + step]).view(np.uint64))
        near = first[bits <= distance]
        one, other = ranks[near], ranks[near + step]
        found += zip(np.maximum(one, other).tolist(), np.minimum(one, other).tolist(), strict=True)
        step += 1
    return found


def _take_from_best_to_worst(db: sqlite3.Connection) -> None:
    """Fill `gone`: a rank is gone when a better one that is alike to it is not."""
    gone = bytearray(db.execute("SELECT COALESCE(MAX(rank), 0) FROM ranked").fetchone()[0] // 8 + 1)
    rows = db.cursor().execute("SELECT worse, better FROM pairs ORDER BY worse, better")
    db.execute("BEGIN")
    for worse, better in rows:
        if gone[better >> 3] >> (better & 7) & 1 or gone[worse >> 3] >> (worse & 7) & 1:
            continue
        gone[worse >> 3] |= 1 << (worse & 7)
        db.execute("INSERT INTO gone VALUES(?, ?)", (worse, better))
    db.execute("COMMIT")
