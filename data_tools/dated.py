"""Listings that tell when objects were last written, of a folder or of an object store alike."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from data_tools.remote import RemoteStore
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
    found = _DatedRemote(url, storage).dated()
    if not found:
        raise DataError(f"folder {url!r} does not exist or is empty")
    return found


class _DatedRemote(RemoteStore):
    """A remote store that also lists times."""

    def dated(self) -> tuple[Dated, ...]:
        """Everything below the URL, sorted by name."""

        def attempt(fs: Any) -> tuple[Dated, ...]:
            root = str(fs._strip_protocol(self.url)).rstrip("/") + "/"
            try:
                found = fs.find(self.url, detail=True)
            except FileNotFoundError:
                return ()
            return tuple(
                sorted(
                    Dated(str(path)[len(root) :], int(info["size"] or 0), _seconds(info))
                    for path, info in found.items()
                    if str(path).startswith(root) and info["type"] == "file"
                )
            )

        return self._call("list", "", attempt)


def _seconds(info: dict[str, Any]) -> float:
    """The time in a listing's row, as any fsspec file system spells it."""
    value = next((info[field] for field in _FIELDS if info.get(field)), 0.0)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value)
