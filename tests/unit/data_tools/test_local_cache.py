"""Local copies: one download for all processes, bounded, and left whole by whatever is killed."""

import hashlib
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from data_tools import verified
from data_tools.local_cache import LocalCache, open_local_cache
from data_tools.storage import TEMPORARY, LocalStore
from data_tools.verified import Content, Verified
from dpal.base.errors import DataError, StorageError
from dpal.base.inputs import Storage

# Not plain forks: other tests leave threads, and locks that they held would be held for ever.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["__main__", "data_tools.local_cache", "pytest"])
SIZE = 10_000


def made(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def get(cache: LocalCache, data: bytes, fetch: Callable[[], bytes] | None = None) -> bytes:
    found = cache.get(hashlib.sha256(data).hexdigest(), len(data), fetch or (lambda: data))
    return bytes(found[:])


def never() -> NoReturn:
    raise AssertionError("the object was fetched again")


def total(cache: LocalCache) -> int:
    return sum(copy.num_bytes for copy in cache.copies())


def started(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    process = CHILDREN.Process(target=target, args=args)
    process.start()
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.005)


# ------------------------------------------------------------------------- several processes


def _read_logged(folder: Path, log: Path, numbers: list[int]) -> None:
    cache = LocalCache(folder, 10**9)
    for number in numbers:

        def fetch(data: bytes = made(number)) -> bytes:
            with log.open("a") as file:
                file.write("fetched\n")
            time.sleep(0.02)
            return data

        assert get(cache, made(number), fetch) == made(number)


def test_processes_of_a_node_fetch_each_object_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    orders = [random.Random(seed).sample(range(8), 8) for seed in range(4)]
    workers = [started(_read_logged, tmp_path / "c", log, order) for order in orders]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "fetched\n" * 8
    assert len(LocalCache(tmp_path / "c", 1).copies()) == 8


def _hang_in_fetch(folder: Path, mark: Path, data: bytes) -> None:
    def fetch() -> bytes:
        mark.touch()
        time.sleep(100)
        return data

    get(LocalCache(folder, 10**9), data, fetch)


def test_a_download_whose_process_is_killed_is_taken_over_at_once(tmp_path: Path) -> None:
    data, mark = made(1), tmp_path / "mark"
    owner = started(_hang_in_fetch, tmp_path / "c", mark, data)
    wait_for(mark)
    killer = threading.Timer(0.3, owner.kill)
    killer.start()
    began = time.monotonic()
    assert get(LocalCache(tmp_path / "c", 10**9, patience_s=60), data) == data
    assert 0.25 < time.monotonic() - began < 10, "as soon as the owner was gone"
    owner.join()


def test_who_waits_too_long_for_another_fetches_alone(tmp_path: Path) -> None:
    data, mark = made(1), tmp_path / "mark"
    owner = started(_hang_in_fetch, tmp_path / "c", mark, data)
    try:
        wait_for(mark)
        cache = LocalCache(tmp_path / "c", 10**9, patience_s=0.2)
        assert get(cache, data) == data
        assert owner.is_alive()
        assert get(cache, data, never) == data, "and published it for the others"
    finally:
        owner.kill()
        owner.join()


class _StopsBeforeRenaming(LocalCache):
    def _accounts(self) -> NoReturn:  # called when the copy is written and not yet published
        (self.folder / "mark").touch()
        time.sleep(100)
        raise AssertionError


def _hang_in_writing(folder: Path, data: bytes) -> None:
    get(_StopsBeforeRenaming(folder, 10**9), data)


def partial(folder: Path) -> list[Path]:
    return list(folder.glob(f".*{TEMPORARY}-*"))


def test_what_a_killed_writer_left_is_swept_and_a_living_writer_is_left_alone(
    tmp_path: Path,
) -> None:
    writer = started(_hang_in_writing, tmp_path, made(1))
    try:
        wait_for(tmp_path / "mark")
        assert get(LocalCache(tmp_path, 10**9), made(2)) == made(2)
        assert len(partial(tmp_path)) == 1
    finally:
        writer.kill()
        writer.join()
    assert len(partial(tmp_path)) == 1
    assert get(LocalCache(tmp_path, 10**9), made(1)) == made(1)
    assert partial(tmp_path) == []


def _read_at_random(folder: Path, max_bytes: int, seed: int) -> None:
    cache, draw = LocalCache(folder, max_bytes), random.Random(seed)
    for _time in range(150):
        data = made(draw.randrange(40), SIZE + draw.randrange(3))
        assert get(cache, data) == data


def test_copies_never_exceed_their_budget_and_are_right_while_they_are_evicted(
    tmp_path: Path,
) -> None:
    cache = LocalCache(tmp_path, 12 * SIZE)
    workers = [started(_read_at_random, tmp_path, cache.max_bytes, seed) for seed in range(3)]
    most = 0
    while any(worker.is_alive() for worker in workers):
        most = max(most, total(cache))
        time.sleep(0.002)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert 6 * SIZE < most <= cache.max_bytes
    assert partial(tmp_path) == []


def _begun(folder: Path, seed: int) -> Path:
    return folder.with_name(f"{folder.name}-{seed}-begun")


def _killed_anywhere(folder: Path, max_bytes: int, seed: int) -> None:
    _begun(folder, seed).touch()
    for again in range(1000):
        _read_at_random(folder, max_bytes, seed + 100 * again)


def test_kills_at_any_moment_leave_whole_copies_alone(tmp_path: Path) -> None:
    cache, draw = LocalCache(tmp_path, 12 * SIZE), random.Random(0)
    for seed in range(8):
        seeds = (seed, seed + 50)
        workers = [started(_killed_anywhere, tmp_path, cache.max_bytes, each) for each in seeds]
        while not all(_begun(tmp_path, each).exists() for each in seeds):
            time.sleep(0.01)
        time.sleep(draw.uniform(0.1, 0.35))
        for worker in workers:
            worker.kill()
            worker.join()
            assert worker.exitcode == -9, "no failure before the kill"
    assert cache.copies()
    for copy in cache.copies():
        assert hashlib.sha256(copy.path.read_bytes()).hexdigest() == copy.path.stem
    _read_at_random(tmp_path, cache.max_bytes, 77)
    assert total(cache) <= cache.max_bytes
    assert partial(tmp_path) == []


# --------------------------------------------------------------------------------- eviction


def test_the_least_recently_used_copy_goes_first(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 3 * SIZE + SIZE // 2)
    for number in (0, 1, 2):
        get(cache, made(number))
        time.sleep(0.02)
    get(cache, made(0), never)
    get(cache, made(3))
    assert {copy.path.stem for copy in cache.copies()} == {
        hashlib.sha256(made(number)).hexdigest() for number in (0, 2, 3)
    }


def test_what_is_read_stays_readable_when_its_copy_is_evicted(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 2 * SIZE)
    held = cache.get(hashlib.sha256(made(0)).hexdigest(), SIZE, lambda: made(0))
    for number in range(1, 5):
        get(cache, made(number))
    assert not cache.path(hashlib.sha256(made(0)).hexdigest()).exists()
    assert held[:] == made(0)


def test_an_object_beyond_the_budget_is_not_kept(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path / "c", SIZE - 1)
    assert get(cache, made(0)) == made(0)
    assert not (tmp_path / "c").exists()
    assert open_local_cache(Storage(copies=str(tmp_path), copies_gb=0.0)) is None
    kept = open_local_cache(Storage(copies=str(tmp_path), copies_gb=1.5))
    assert kept is not None
    assert (kept.folder, kept.max_bytes) == (tmp_path, 1_500_000_000)


# ----------------------------------------------------------------------------- verification


def test_a_file_is_hashed_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(verified.hashlib, "sha256", lambda data: hashed.append(1) or sha256(data))
    path, data = tmp_path / "x", made(0)
    path.write_bytes(data)
    seen, content = Verified(), Content(sha256(data).hexdigest(), SIZE)
    for _time in range(3):
        assert seen.check(path.read_bytes(), path.stat(), content)
    assert len(hashed) == 1
    assert not seen.check(path.read_bytes(), path.stat(), content._replace(num_bytes=SIZE - 1))
    assert len(hashed) == 1, "a wrong size needs no hash"
    path.write_bytes(data[:-1] + b"!")
    assert not seen.check(path.read_bytes(), path.stat(), content)
    assert not seen.check(path.read_bytes(), path.stat(), content), "and it is not remembered"


def test_a_copy_that_this_process_wrote_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, data = LocalCache(tmp_path, 10**9), made(0)
    digest = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(verified.hashlib, "sha256", lambda _data: never())
    for _time in range(3):
        assert cache.get(digest, SIZE, lambda: data)[:] == data


@pytest.mark.parametrize("damage", [b"", made(0)[: SIZE // 2], made(0)[:-1] + b"!"])
def test_a_copy_damaged_on_this_disk_is_fetched_again(damage: bytes, tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 10**9)
    get(cache, made(0))
    cache.path(hashlib.sha256(made(0)).hexdigest()).write_bytes(damage)
    assert get(cache, made(0)) == made(0)
    assert get(cache, made(0), never) == made(0)


def test_what_fetching_raises_is_raised_and_nothing_is_kept(tmp_path: Path) -> None:
    def gone() -> NoReturn:
        raise DataError("object 'x' does not exist")

    cache = LocalCache(tmp_path, 10**9)
    for _time in range(2):
        with pytest.raises(DataError, match="does not exist"):
            get(cache, made(0), gone)
    assert cache.copies() == []


# -------------------------------------------------------------------------------- full disks


def test_a_full_disk_is_told_with_the_keys_that_mend_it(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(7_900_000))
    cache = LocalCache(small_disk / "c", 10**9)
    keys = r"no space left; set storage\.copies .* storage\.copies_gb=1 \("
    with pytest.raises(StorageError, match=keys):
        get(cache, made(0, 3_000_000))
    assert cache.copies() == []
    assert partial(small_disk / "c") == []


def test_copies_give_way_when_something_else_fills_the_disk(small_disk: Path) -> None:
    cache = LocalCache(small_disk / "c", 10**9)
    for number in range(4):
        assert get(cache, made(number, 1_500_000)) == made(number, 1_500_000)
    LocalStore(small_disk).put("checkpoint", bytes(1_500_000))
    assert get(cache, made(9, 1_500_000)) == made(9, 1_500_000)
    assert get(cache, made(9, 1_500_000), never) == made(9, 1_500_000)
    assert len(cache.copies()) < 5


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"file/c'.*storage\.copies"):
        get(LocalCache(tmp_path / "file" / "c", 10**9), made(0))
