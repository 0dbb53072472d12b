"""Tars of pictures that others wrote, as WebDataset has them.

A JPEG or PNG member is an item. Members of the same key (the path up to the first dot of its last
part) tell of it: `.json` gives facts, `.txt` the caption, `.cls` the class. All other members are
passed over. To find them, a remote tar is copied once into the temporary folder.
"""

from collections import Counter
from collections.abc import Iterator
from sqlite3 import Connection
from typing import Any

from data_tools.person_facts import require_placed
from data_tools.source import Item
from data_tools.sources.catalogue import TAR_NAME, Catalogue, scratch, stat_of, to_key, to_name
from data_tools.sources.persons import tagged
from data_tools.sources.tar_members import tar_members
from data_tools.sources.text import parse_json
from data_tools.sources.whole_files import OpenFile, WholeFiles
from data_tools.storage import Listed, LocalStore, SourceStore
from dpal.base.errors import DataError

IMAGES = ("jpg", "jpeg", "png")
FACTS = ("json", "txt", "cls")
LARGEST_FACT = 2**20  # bytes


class TarSource:
    """Pictures in the tars of a folder or prefix, or in a single tar.

    A picture is asked for as `<tar>@<offset>+<size>`, so it is found without an index.

    Args:
        store: the folder; of a single tar the one that it lies in.
        single: name of the single tar.

    Attributes:
        left_out: number of members that are no regular files, have names that climb, are there
            twice, or have too long a text, once items were read.
    """

    def __init__(self, store: SourceStore, catalogue: Catalogue | None, single: str = "") -> None:
        self.url = f"{store.url}/{single}" if single else store.url
        self.left_out: Counter[str] = Counter()
        self._store, self._catalogue, self._single = store, catalogue, single
        self._tars = WholeFiles(store)

    def items(self) -> Iterator[Item]:
        """All pictures sorted by name: `<tar>/<member>`, or `<member>` of a single tar.

        Raises:
            DataError: naming the tar, when one is damaged or truncated, or has no picture.
        """
        self.left_out.clear()
        for tar in sorted(self._listed(), key=lambda tar: to_key(f"{tar.name}/")):
            yield from self._items_of(tar)

    def read(self, picture: str) -> bytes:
        """A picture's bytes. Raises DataError when the tar is missing or ends before."""
        tar, _, place = picture.rpartition("@")
        offset, _, size = place.partition("+")
        if not tar or not (offset.isascii() and offset.isdigit() and size.isdigit()):
            raise DataError(f"{self.url!r} has no picture {picture!r}")
        held = self._tars.held(tar)
        if held is None:  # pictures asked for in any order cost no copies of tars
            return self._store.get_range(tar, int(offset), int(size))
        return held.read(int(offset), int(size))

    def _listed(self) -> list[Listed]:
        if self._catalogue is not None:
            return list(self._catalogue.entries(TAR_NAME))
        return [_one(self._store, self._single)]

    def _items_of(self, listed: Listed) -> Iterator[Item]:
        where = f"{self._store.url}/{listed.name}"
        tar = self._tars.open(listed.name)
        with scratch(
            "CREATE TABLE members (name BLOB PRIMARY KEY, key BLOB, ending TEXT, at INT, size INT)"
        ) as database:
            database.execute("BEGIN")
            for name, offset, size in tar_members(tar, where, self.left_out):
                self._note(database, name, offset, size)
            database.execute("CREATE INDEX by_key ON members (key)")
            database.execute("COMMIT")
            marks = ",".join("?" * len(IMAGES))
            found = database.execute(
                f"SELECT name, key, at, size FROM members WHERE ending IN ({marks}) ORDER BY name",
                IMAGES,
            )
            nothing = True
            for name, key, offset, size in found:
                nothing = False
                facts = _facts(database, key, tar, where)
                member = to_name(name)
                yield Item(
                    member if self._single else f"{listed.name}/{member}",
                    f"{listed.name}@{offset}+{size}",
                    size,
                    tagged(f"{listed.version} {offset}", facts),
                    None,
                    facts,
                )
        if nothing:
            raise DataError(f"tar {where!r} has no picture: accepted are JPEG and PNG members")

    def _note(self, database: Connection, name: str, offset: int, size: int) -> None:
        folder, slash, last = name.rpartition("/")
        stem, _, ending = last.partition(".")
        ending = ending.lower()
        if ending not in IMAGES and ending not in FACTS:
            return
        if ending in FACTS and size > LARGEST_FACT:
            self.left_out[f"text of more than {LARGEST_FACT} bytes"] += 1
            return
        noted = database.execute(
            "INSERT OR IGNORE INTO members VALUES (?, ?, ?, ?, ?)",
            (to_key(name), to_key(f"{folder}{slash}{stem}"), ending, offset, size),
        )
        if not noted.rowcount:
            self.left_out["name that is there twice"] += 1


def _facts(database: Connection, key: bytes, tar: OpenFile, where: str) -> dict[str, Any]:
    """What the members beside a picture tell of it."""
    marks = ",".join("?" * len(FACTS))
    beside = database.execute(
        f"SELECT name, ending, at, size FROM members WHERE key = ? AND ending IN ({marks}) "
        "ORDER BY ending",
        (key, *FACTS),
    ).fetchall()
    facts: dict[str, Any] = {}
    for name, ending, offset, size in beside:
        try:
            text = tar.read(offset, size).decode("utf-8-sig")
            if ending == "json":
                told = parse_json(text)
                facts |= told if isinstance(told, dict) else {"json": told}
            elif ending == "txt":
                facts["caption"] = text.strip()
            else:
                number = text.strip()
                facts["class"] = int(number) if number.lstrip("-").isdecimal() else number
        except ValueError as error:
            raise DataError(
                f"tar {where!r}: member {to_name(name)!r} cannot be understood ({error}): "
                "accepted is UTF-8 text, and in a .json standard JSON"
            ) from None
    require_placed(facts, f"tar {where!r}, beside {to_name(key)!r}")
    return facts


def _one(store: SourceStore, name: str) -> Listed:
    """One object as the listing of its folder shows it."""
    if isinstance(store, LocalStore):
        found: Listed | None = stat_of(str(store.path(name)), name)
    else:
        found = Catalogue(store).find(name)
    if found is None or found.size < 0:
        raise DataError(f"tar {store.url + '/' + name!r} does not exist or is no file")
    return found
