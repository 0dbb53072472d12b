"""Pictures that lie as files below a folder or prefix."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from data_tools.source import Item
from data_tools.sources.catalogue import IMAGE_NAMES, Catalogue
from data_tools.sources.market1501 import ACCEPTED, read_name
from data_tools.sources.persons import tagged
from data_tools.storage import SourceStore
from dpal.base.errors import DataError


class FolderSource:
    """Every file below a folder is an item, whole; what is no picture is for the policy to say.

    Args:
        store: the folder.
        catalogue: its listing.
        names: `market1501`: the pictures' names tell identity and camera.

    Attributes:
        catalogue: its listing.
        left_out: number of junk and distractor pictures, once items were read.
    """

    def __init__(
        self, store: SourceStore, catalogue: Catalogue, names: Literal["plain", "market1501"]
    ) -> None:
        self.url = store.url
        self.left_out: Counter[str] = Counter()
        self._store, self._named = store, names == "market1501"
        self.catalogue = catalogue

    def items(self) -> Iterator[Item]:
        """All files, sorted by name.

        Raises:
            DataError: when the folder is empty, or a picture's name is not of the convention.
        """
        if not self.catalogue.num_files:
            raise DataError(f"folder {self.url!r} is empty: accepted are folders of JPEG or PNG")
        self.left_out.clear()
        for name, size, version in self.catalogue.entries():
            facts = self._facts(name) if self._named else {}
            if facts is not None:
                yield Item(name, name, size, tagged(version, facts), None, facts)

    def read(self, picture: str) -> bytes:
        """A file's bytes. Raises DataError when it is missing."""
        return self._store.get(picture)

    def _facts(self, name: str) -> dict[str, str] | None:
        """None for a picture that is left out."""
        if not name.lower().endswith(IMAGE_NAMES):
            return {}
        named = read_name(name)
        if named is None:
            raise DataError(
                f"image {self.url + '/' + name!r} has no name as data.names=market1501 reads: "
                f"accepted are {ACCEPTED}"
            )
        if named.left_out:
            self.left_out[named.left_out] += 1
            return None
        return named.facts
