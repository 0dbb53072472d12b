"""The listing of an S3 prefix page by page, so that its length costs no memory."""

from collections.abc import Iterator
from typing import Any

from data_tools.remote import RemoteStore
from data_tools.storage import Listed
from dpal.base.errors import DataError

S3 = ("s3", "s3a")


def listed_by_pages(store: RemoteStore) -> Iterator[Listed]:
    """As `store.listing()` says it, a page of a thousand objects at a time.

    Raises:
        DataError: when there is nothing.
        StorageError: when the store refuses or cannot be reached.
    """
    scheme, _, place = store.url.partition("://")
    if scheme not in S3:
        yield from store.listing()
        return
    bucket, _, folder = place.partition("/")
    prefix = f"{folder}/" if folder else ""
    more: dict[str, str] = {}
    nothing = True
    while True:
        page = _page(store, {"Bucket": bucket, "Prefix": prefix, **more})
        for entry in page.get("Contents", ()):
            name = entry["Key"][len(prefix) :]
            if name and not name.endswith("/"):  # a marker of an empty folder
                nothing = False
                yield Listed(name, int(entry["Size"]), str(entry["ETag"]))
        if not page.get("IsTruncated"):
            break
        more = {"ContinuationToken": page["NextContinuationToken"]}
    if nothing:
        raise DataError(f"folder {store.url!r} does not exist or is empty")


def _page(store: RemoteStore, request: dict[str, str]) -> dict[str, Any]:
    # The store's own retries and error sentences hold for every page.
    answer = store.call("list", "", lambda fs: fs.call_s3("list_objects_v2", **request))
    return dict(answer)
