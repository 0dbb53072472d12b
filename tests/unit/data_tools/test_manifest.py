"""The manifest: round trip, and refusal of anything that was not published whole."""

import json
from pathlib import Path

import pytest

from data_tools.manifest import MANIFEST, Manifest, ShardRef, keys_digest, load_manifest
from data_tools.storage import LocalStore
from dpal.base.errors import DataError

REF = ShardRef("persons-000000.tar", "0" * 64, 10240, 3, keys_digest(["a", "b", "c"]))
MANY = Manifest((REF, REF._replace(name="persons-000001.tar", num_samples=4)), (("duplicate", 2),))


def test_a_manifest_survives_its_json() -> None:
    assert Manifest.from_json(MANY.to_json()) == MANY
    assert MANY.num_samples == 7


def test_the_digest_covers_the_shards_and_not_the_rejects() -> None:
    assert Manifest(MANY.shards).digest == MANY.digest
    assert Manifest(MANY.shards[::-1]).digest != MANY.digest
    for field in ShardRef._fields:
        value = getattr(REF, field)
        other = REF._replace(**{field: value + 1 if isinstance(value, int) else value + "0"})
        assert Manifest((other,)).digest != Manifest((REF,)).digest, field


def test_keys_are_told_apart_from_their_concatenation() -> None:
    assert keys_digest(["ab", "c"]) != keys_digest(["a", "bc"])


def test_an_absent_manifest_is_a_data_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `dpal shard`"):
        load_manifest(LocalStore(tmp_path))


def changed(**values: object) -> str:
    record = json.loads(MANY.to_json())
    record["shards"][0].update(values)
    return json.dumps(record)


def alone(**values: int) -> str:
    """A manifest whose digest is right."""
    return Manifest((MANY.shards[0]._replace(**values),)).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        MANY.to_json()[:-40],
        "\ud800",
        "[" * 100_000,
        changed(name="../../etc/passwd"),
        changed(name="persons-000001.tar"),
        changed(num_samples=5),
        changed(num_bytes=-1),
        alone(num_samples=10**12),
        alone(num_samples=10**30),
        alone(num_bytes=2**36 + 1),
        changed(sha256="x"),
        changed(more=1),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    LocalStore(tmp_path).put(MANIFEST, text.encode(errors="surrogatepass"))
    with pytest.raises(DataError, match="damaged"):
        load_manifest(LocalStore(tmp_path))


def test_a_manifest_of_another_format_is_named(tmp_path: Path) -> None:
    LocalStore(tmp_path).put(
        MANIFEST, MANY.to_json().replace('"format": 1', '"format": 9').encode()
    )
    with pytest.raises(DataError, match="format 9: accepted is 1"):
        load_manifest(LocalStore(tmp_path))


def test_a_manifest_that_was_damaged_on_the_way_is_asked_for_again(tmp_path: Path) -> None:
    class Flipping(LocalStore):
        answers = 0

        def get(self, name: str) -> bytes:
            self.answers += 1
            data = super().get(name)
            return data.replace(b"persons", b"perxons", 1) if self.answers == 1 else data

    LocalStore(tmp_path).put(MANIFEST, MANY.to_json().encode())
    assert load_manifest(Flipping(tmp_path)) == MANY
