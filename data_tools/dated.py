"""Listings that tell when objects were last written, of a folder or of an object store alike."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from data_tools.storage import LocalStore, open_store
from dpal.base.errors import DataError
from dpal.base.inputs import Storage

_FIELDS = ("LastModified", "last_modified", "updated", "created", "mtime")


class Dated(NamedTuple):
    """One object.

    Attributes:
        name: relative to the URL that was listed.
        size: bytes.
        written: when it was last written, in seconds since 1970; 0 where the store does not say.
    """

    name: str
    size: int
    written: float


def dated_listing(url: str, storage: Storage) -> tuple[Dated, ...]:
    """Everything below `url`, sorted by name; one listing, no request for each object.

    Raises:
        DataError: when there is nothing.
        StorageError: when the store cannot be reached.
    """
    store = open_store(url, storage)
    if isinstance(store, LocalStore):
        return tuple(
            Dated(entry.name, entry.size, int(entry.version or 0) / 1e9)
            for entry in store.listing()
        )
    from data_tools.remote import RemoteStore  # only now: it imports fsspec

    found = RemoteStore(url, storage).details()
    if not found:
        raise DataError(f"folder {url!r} does not exist or is empty")
    return tuple(sorted(Dated(name, int(i["size"] or 0), _seconds(i)) for name, i in found))


def _seconds(info: dict[str, Any]) -> float:
    """The time in a listing's row, as any fsspec file system spells it."""
    value = next((info[field] for field in _FIELDS if info.get(field)), 0.0)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value)
