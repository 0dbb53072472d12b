"""`dpal audit --unused`: target caches that no recipe refers to, and tars that no ledger lists.

What a recipe refers to follows from its content: the digests of its teachers' caches. A recipe
whose shards or weights are not there refers to what nobody can tell, so it stops the command.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.backgrounds import load_backgrounds
from data_tools.dated import dated_listing
from data_tools.manifest import manifest_of
from data_tools.storage import open_store
from data_tools.unused import CacheFolder, cache_folders, delete_cache, delete_orphans
from dpal.base.config import load_recipe
from dpal.base.errors import EXIT_DONE, ConfigError, DataError, DpalError
from dpal.base.recipe import Recipe
from jobs.caching.plan import definition_of, single_teacher_recipes


def run_unused(
    url: str, files: Sequence[str], *, delete: bool = False, as_json: bool = False
) -> int:
    """Print, and with `delete` delete, what none of the recipes needs; return 0.

    Args:
        url: folder or URL that holds `targets-<digest>/` folders.
        files: recipes, every one of those whose targets are to stay.
        as_json: print one JSON object instead of lines.

    Raises:
        ConfigError: no recipe, or with `delete` none that keeps its targets at `url`.
        DataError: nothing is at `url`, or what a recipe refers to cannot be told.
    """
    if not files:
        raise ConfigError("--unused needs --recipes: those whose targets are to stay")
    recipes = {}
    for file in files:
        with _naming(file):
            recipes[file] = load_recipe(file)
    if delete and not any(_same(recipe.cache.url, url) for recipe in recipes.values()):
        raise ConfigError(
            f"--delete: none of the recipes keeps its targets in {url!r}, the first one in "
            f"{next(iter(recipes.values())).cache.url!r}; accepted is a recipe that does"
        )
    storage = next(iter(recipes.values())).storage
    users = _users(recipes)
    folders = cache_folders(dated_listing(url, storage), time.time())
    if not folders:
        raise DataError(f"no folder targets-<digest> in {url!r}")
    rows = [_row(folder, users.get(folder.digest, [])) for folder in folders]
    if not as_json:
        for row in rows:
            print(_line(row))
    if delete:
        for folder, row in zip(folders, rows, strict=True):
            store = open_store(f"{url.rstrip('/')}/{folder.name}", storage)
            if row["used_by"]:
                delete_orphans(store, folder.orphans)
            else:
                delete_cache(store, folder.objects)
    told = "deleted" if delete else "may go; --delete deletes them"
    if as_json:
        print(json.dumps({"url": url, "deleted": delete, "caches": rows}, indent=1))
    else:
        unused = [row for row in rows if not row["used_by"]]
        num_bytes = sum(row["bytes"] if not row["used_by"] else row["orphan_bytes"] for row in rows)
        print(f"{len(unused)} of {len(rows)} caches, {_size(num_bytes)}: {told}")
    return EXIT_DONE


def _users(recipes: dict[str, Recipe]) -> dict[str, list[str]]:
    """Recipe files by the digest of each cache that they refer to."""
    users: dict[str, list[str]] = {}
    for file, recipe in recipes.items():
        if not recipe.aligned_teachers:
            continue
        with _naming(file):
            manifest, pool = manifest_of(recipe), load_backgrounds(recipe)
            for single in single_teacher_recipes(recipe):
                digest = definition_of(single, manifest, pool).digest
                users.setdefault(digest, []).append(file)
    return users


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Name the recipe that an error is about: there are several."""
    try:
        yield
    except DpalError as error:
        if file not in str(error):
            error.args = (f"{file}: {error}",)
        raise


def _row(folder: CacheFolder, users: list[str]) -> dict[str, Any]:
    age = (time.time() - folder.written) / 86400 if folder.written else None
    return {
        "folder": folder.name,
        "used_by": users,
        "objects": len(folder.objects),
        "bytes": folder.num_bytes,
        "days": age,
        "orphans": [orphan.name for orphan in folder.orphans],
        "orphan_bytes": sum(orphan.size for orphan in folder.orphans),
    }


def _line(row: dict[str, Any]) -> str:
    used = f"used by {', '.join(row['used_by'])}" if row["used_by"] else "unused"
    age = f"last written {row['days']:.1f} days ago" if row["days"] is not None else "age unknown"
    line = f"{row['folder']}: {used}, {_size(row['bytes'])} in {row['objects']} objects, {age}"
    if row["orphans"]:
        line += f"; {len(row['orphans'])} tars without a ledger row, {_size(row['orphan_bytes'])}"
    return line


def _size(num_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def _same(one: str, other: str) -> bool:
    if "://" in one or "://" in other:
        return one.rstrip("/") == other.rstrip("/")
    return Path(one).resolve() == Path(other).resolve()
