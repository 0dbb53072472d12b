"""Which adapter reads a source: its name says so, or what the folder holds.

    *.csv  *.parquet        a table of pictures
    *.json                  COCO instances or person keypoints
    *.odgt                  CrowdHuman
    *.tar                   one tar
    data.mdb, or a folder with one    an LMDB environment, as LUPerson
    a folder with tars and no picture called .jpg, .jpeg or .png      all tars in it
    any other folder        the files in it

A local folder is a folder, whatever it is called.
"""

from functools import partial

from data_tools.source import Source
from data_tools.sources.catalogue import Catalogue
from data_tools.sources.coco import read_coco
from data_tools.sources.crowdhuman import read_crowdhuman
from data_tools.sources.folder import FolderSource
from data_tools.sources.luperson import FILE, LmdbSource
from data_tools.sources.persons import PersonSource
from data_tools.sources.table import read_table
from data_tools.sources.tars import TarSource
from data_tools.storage import SourceStore, local_path, open_store
from dpal.base.errors import ConfigError
from dpal.base.inputs import Data, Storage

ACCEPTED = (
    "folders of JPEG or PNG, of .tar or with data.mdb; a .csv, .parquet, COCO .json, CrowdHuman "
    ".odgt or .tar"
)


def open_source(url: str, data: Data, storage: Storage) -> Source:
    """The images at `url`, a folder, file or prefix, local or remote.

    Args:
        data: `names`, `pictures`, `persons` are read.

    Raises:
        ConfigError: for a kind of file that no adapter reads, or whose package is missing.
        DataError: when there is nothing, or an LMDB environment that is damaged.
    """
    url = url.rstrip("/") or url
    if not _is_local_folder(url):
        source = _open_file(url, data, storage)
        if source is not None:
            return source
    return _open_folder(open_store(url, storage), data)


def _open_file(url: str, data: Data, storage: Storage) -> Source | None:
    """The source that is a single file; None for what can only be a folder."""
    folder, _, name = url.rpartition("/")
    lower = name.lower()
    root = folder or ("/" if url.startswith("/") else ".")
    if name == FILE:
        return LmdbSource(open_store(root, storage))
    if lower.endswith(".tar"):
        return TarSource(open_store(root, storage), None, name)
    if not lower.endswith((".csv", ".parquet", ".json", ".odgt")):
        local = local_path(url)
        if local is not None and local.exists():
            raise ConfigError(f"source {url!r} is a file of no known kind: accepted are {ACCEPTED}")
        return None
    store = open_store(root, storage)
    pictures = open_store(data.pictures, storage) if data.pictures else store
    if lower.endswith(".json"):
        return PersonSource(url, pictures, partial(read_coco, store, name), data.persons)
    if lower.endswith(".odgt"):
        return PersonSource(url, pictures, partial(read_crowdhuman, store, name), data.persons)
    return PersonSource(
        url,
        pictures,
        lambda _left_out: read_table(store, name, pictures.url),
        data.persons,
        whole=True,
        loose=False,
    )


def _open_folder(store: SourceStore, data: Data) -> Source:
    if store.exists(FILE):
        return LmdbSource(store)
    catalogue = Catalogue(store)
    if catalogue.num_tars and not catalogue.num_images:
        return TarSource(store, catalogue)
    return FolderSource(store, catalogue, data.names)


def _is_local_folder(url: str) -> bool:
    local = local_path(url)
    return local is not None and local.is_dir()
