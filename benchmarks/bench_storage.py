"""Whole-object reads from an S3 server on this machine: the store against other ways to read.

    python benchmarks/bench_storage.py [--rounds 3]

"store" is what `data_tools.storage.open_store(...).get` does, with its checks and timeouts;
"s3fs cat_file" and "s3fs open" are the same objects by s3fs alone, "obstore" by that library when
it is installed. Memory is touched by all of them: each hands back the object's bytes.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from timing import cpu_seconds, interleave, table, wall_seconds

from data_tools.remote import RemoteStore

Read = Callable[[str], bytes]
Row = list[object]

SIZES = {"64 MiB": (2**26, 8), "4 MiB": (2**22, 32)}  # bytes of one object, objects of a round


def ways_of(store: RemoteStore, bucket: str, prefix: str, endpoint: str) -> dict[str, Read]:
    """By name, every way to read an object of the store's prefix."""
    filesystem = store._filesystem()

    def opened(name: str) -> bytes:
        with filesystem.open(f"{bucket}/{prefix}/{name}", "rb", cache_type="none") as file:
            return bytes(file.read())

    ways: dict[str, Read] = {
        "store": store.get,
        "s3fs cat_file": lambda n: filesystem.cat_file(f"{bucket}/{prefix}/{n}", max_concurrency=1),
        "s3fs open": opened,
    }
    if importlib.util.find_spec("obstore") is not None:
        import obstore
        from obstore.store import S3Store

        other = S3Store(
            bucket,
            prefix=prefix,
            endpoint=endpoint,
            access_key_id=store._storage.key.get_secret_value(),
            secret_access_key=store._storage.secret.get_secret_value(),
            region="us-east-1",
            client_options={"allow_http": True},
        )
        ways["obstore"] = lambda name: bytes(obstore.get(other, name).bytes())
    return ways


def race(ways: dict[str, Read], names: Sequence[str], size: int, rounds: int) -> list[Row]:
    """Name, readers, MB/s, CPU seconds per GB and their ratio to the store's, for 1 and 8."""
    rows: list[Row] = []
    for readers in (1, 8):

        def work(read: Read, readers: int = readers) -> Callable[[], None]:
            def run() -> None:
                with ThreadPoolExecutor(readers) as pool:
                    for data in pool.map(read, names):
                        assert len(data) == size

            return run

        all_work = {name: work(read) for name, read in ways.items()}
        volume = size * len(names)
        cpu = interleave(all_work, rounds, clock=cpu_seconds)
        wall = interleave(all_work, rounds, warm_up=0, clock=wall_seconds)
        rows += [
            [
                name,
                readers,
                volume / wall[name].median / 1e6,
                cpu[name].median / (volume / 1e9),
                cpu[name].over(cpu["store"]),
            ]
            for name in ways
        ]
    return rows


def main() -> None:
    """Start a server, write the objects, and print one table for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "s3")]
    import seaweed

    with tempfile.TemporaryDirectory() as folder:
        server, process = seaweed.start_s3(Path(folder))
        try:
            store = RemoteStore(f"s3://{server.bucket}/bench", server.storage())
            ways = ways_of(store, server.bucket, "bench", server.endpoint)
            for label, (size, count) in SIZES.items():
                names = [f"{size}-{index}" for index in range(count)]
                for name in names:
                    store.put(name, os.urandom(size))
                head = [label, "readers", "MB/s", "CPU s/GB", "CPU / store"]
                print(table(head, race(ways, names, size, rounds)), end="\n\n", flush=True)
        finally:
            seaweed.kill_s3(process)


if __name__ == "__main__":
    main()
