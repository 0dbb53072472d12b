"""`dpal cache` under kill -9 at random moments: is the finished cache that of an undisturbed job?

    python benchmarks/kill_cache.py [--kills 50] [--shards 40] [--seed 0]

Victims are drawn: a teacher actor, the driver, the raylet, the head. A job that ended is started
again; a finished cache is compared byte for byte with one that a single process made, and a new one
is begun until all kills are spent. The actors' logs say when each shard was begun: never after its
ledger row was there. Exit code 1 when anything differs. About half a minute for each kill.
"""

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file

from data_tools.storage import TEMPORARY, LocalStore
from dpal.base.config import resolve_recipe
from dpal.base.errors import EXIT_DONE, EXIT_RUN_AGAIN
from dpal.base.recipe import Recipe
from dpal.model.timm_import import timm
from jobs import build_shards
from jobs.caching.worker import ShardWorker

NAME = "vit_tiny_patch16_224"
A_SHARD = 8  # images
VICTIMS = {"actor": 24, "driver": 12, "raylet": 7, "gcs_server": 7}  # of 50
QUIET_S = (0.0, 4.0)  # between a working actor and the next kill
PATIENCE_S = 300.0
TICK_S = 0.02  # of the file system's clock, and of a process that is asked for its title
BEGUN = re.compile(r"^(\d+\.\d+) shard (\S+) begun$", re.MULTILINE)


class Killer:
    """Runs jobs on one recipe, and kills their processes."""

    def __init__(self, folder: Path, shards: int, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.recipe = made_recipe(folder, shards * A_SHARD)
        self.expected = undisturbed(self.recipe, folder / "expected")
        self.victims: Counter[str] = Counter()
        self.codes: Counter[int] = Counter()
        self.driver: psutil.Popen | None = None
        self.begun = self.twice = self.rounds = 0
        self.errors: list[str] = []

    def round(self, kills: int) -> int:
        """Fill one cache with at most `kills` kills on the way; returns how many there were."""
        self.rounds += 1
        url, done = self.folder / f"cache-{self.rounds}", 0
        logs = self.folder / f"r{self.rounds}"
        while True:
            self.driver = self._start(url, logs)
            ended = False
            while not ended and done < kills:
                victim = self.chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
                ended = not self._strike(victim)
                done += not ended
                # What hits the head ends the driver, by itself.
                ended |= victim != "actor"
            code = self._wait()
            if code == EXIT_DONE:
                self._compare(url, logs)
                return done
            if code not in (EXIT_RUN_AGAIN, -9):
                self.errors.append(f"exit code {code}: {self._log(logs)}")
                return done

    def _start(self, url: Path, logs: Path) -> psutil.Popen:
        cache = self.recipe.cache.model_copy(update={"url": str(url)})
        path = self.folder / "recipe.yaml"
        path.write_text(self.recipe.model_copy(update={"cache": cache}).to_yaml())
        logs.mkdir(exist_ok=True)
        with (logs / "driver.log").open("a") as log:
            return psutil.Popen(
                [sys.executable, "-m", "jobs", "cache", str(path)],
                stdout=log,
                stderr=log,
                env={**os.environ, "RAY_TMPDIR": str(logs)},
            )

    def _strike(self, victim: str) -> bool:
        """Kill `victim` some time after an actor works; False when the job ended before."""
        if not self._await(lambda: self._named("TeacherActor.cache_shard")):
            return False
        until = time.monotonic() + self.chance.uniform(*QUIET_S)
        while time.monotonic() < until:
            if self.driver.poll() is not None:
                return False
            time.sleep(TICK_S)
        wanted = "ray::TeacherActor" if victim == "actor" else victim
        found = [self.driver] if victim == "driver" else self._named(wanted)
        if not found:  # an actor that is being replaced: whom else is there to kill?
            found, victim = [self.driver], "driver"
        orphans = self._children() if victim == "driver" else []
        self.chance.choice(found).kill()
        self.victims[victim] += 1
        if orphans:
            self.driver.wait()
            self._end(orphans)
        return True

    def _await(self, probe: object) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self.driver.poll() is not None:
                return False
            if probe():
                return True
            time.sleep(TICK_S)
        self.errors.append(f"no actor worked within {PATIENCE_S:.0f} s")
        self.driver.kill()
        return False

    def _wait(self) -> int:
        children = self._children()
        try:
            code = self.driver.wait(PATIENCE_S)
        except psutil.TimeoutExpired:
            self.errors.append(f"the driver did not end within {PATIENCE_S:.0f} s")
            self.driver.kill()
            code = self.driver.wait()
        self.codes[code] += 1
        self._end(children)
        return code

    def _end(self, processes: list[psutil.Process]) -> None:
        """What Ray leaves behind goes by itself; what has not after 5 s is not waited for."""
        _gone, alive = psutil.wait_procs(processes, timeout=5)
        for process in alive:
            process.kill()

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.driver.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _named(self, word: str) -> list[psutil.Process]:
        found = []
        for process in self._children():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if command and word in command[0]:
                found.append(process)
        return found

    def _compare(self, url: Path, logs: Path) -> None:
        store = LocalStore(url)
        if store.list() != self.expected.list():
            self.errors.append(f"{url.name}: other objects")
        differing = [n for n in self.expected.list() if store.get(n) != self.expected.get(n)]
        if differing:
            self.errors.append(f"{url.name}: {len(differing)} differ, first {differing[0]}")
        rows = {path.stem: path.stat().st_ctime for path in url.glob("*/ledger/*.json")}
        for path in logs.rglob("worker-*.out"):
            for at, name in BEGUN.findall(path.read_text(errors="replace")):
                self.begun += 1
                if float(at) > rows[name.removesuffix(".tar")] + TICK_S:
                    self.twice += 1
                    self.errors.append(f"{name} was begun after it was committed")
        left = [path for path in url.rglob("*") if TEMPORARY in path.name]
        print(f"  {url.name}: {len(rows)} shards, {len(left)} files of killed writers", flush=True)
        shutil.rmtree(url)

    def _log(self, logs: Path) -> str:
        return (logs / "driver.log").read_text(errors="replace")[-2000:]


def made_recipe(folder: Path, count: int) -> Recipe:
    """A recipe over `count` pictures and a random ViT-Ti, sharded."""
    torch.manual_seed(0)
    weights = folder / "vit.safetensors"
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), weights)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(count):
        small = rng.integers(0, 256, size=(8, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 128)).save(folder / "images" / f"{index:04d}.jpg")
    recipe = resolve_recipe(
        {
            "name": "killed",
            "output": str(folder / "runs"),
            "data": {"images": [str(folder / "images")], "samples_per_shard": A_SHARD},
            "views": {"height": 128, "width": 64, "count": 2, "composites": 1},
            "teacher": {
                "kind": "timm",
                "name": NAME,
                "weights": str(weights),
                "input": [128, 64],
                "batch_size": 4,
            },
            "cache": {"calibration_images": 8, "actors": 2},
            "student": {"height": 128, "width": 64},
            "train": {"duration": "1 steps", "global_batch": 8, "micro_batch": 8},
        }
    )
    build_shards.run(recipe)
    return recipe


def undisturbed(recipe: Recipe, url: Path) -> LocalStore:
    """The same cache, made in this process without Ray."""
    cache = recipe.cache.model_copy(update={"url": str(url)})
    worker = ShardWorker(recipe.model_copy(update={"cache": cache}))
    worker.calibrate()
    for ref in worker.manifest.shards:
        worker.cache_shard(ref)
    return LocalStore(url)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="k") as name:  # Ray's sockets want a short path
        killer, left, begin = Killer(Path(name), arguments.shards, arguments.seed), 0, 0.0
        left, begin = arguments.kills, time.monotonic()
        while left > 0 and not killer.errors:
            left -= killer.round(left)
            told = ", ".join(f"{count} {name}" for name, count in killer.victims.items())
            print(f"{killer.rounds} caches, kills: {told or 'none'}", flush=True)
        print(
            f"exit codes of drivers: {dict(killer.codes)}; {killer.begun} computations of "
            f"{killer.rounds * arguments.shards} shards, {killer.twice} of them after a commit; "
            f"{time.monotonic() - begin:.0f} s"
        )
    for error in killer.errors:
        print(error, file=sys.stderr)
    return 1 if killer.errors else 0


if __name__ == "__main__":
    sys.exit(main())
