"""The parity gate: a cached run starts when its targets are the teacher's, and only then."""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import aligned_samples
from data_tools.backgrounds import load_backgrounds
from data_tools.feature_cache import TargetCache, open_cache
from data_tools.manifest import manifest_of
from data_tools.target_tar import TargetShard, stride_of
from dpal.base.config import resolve_recipe
from dpal.base.errors import EXIT_DATA, EXIT_DONE, DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.record import RecordLayout
from dpal.views.plan import ViewPlan
from dpal.views.specs import Box, ViewSpec
from jobs import build_shards, parity
from jobs.caching.plan import definition_of, single_teacher_recipes
from jobs.comparing import meter, places
from jobs.comparing.places import draw_places
from jobs.parity import require_parity, run_parity

from command import call
from tiny import fill_cache, tiny_recipe, tiny_values, write_persons, write_recipe, write_teacher
from tiny_scenes import ARMS, arm_recipe

SAMPLES, NUM_IMAGES = 4, 16


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    update = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()
    }
    return recipe.model_copy(update=update)


def caches_of(recipe: Recipe) -> list[TargetCache]:
    manifest, pool = manifest_of(recipe), load_backgrounds(recipe)
    return [
        open_cache(one, definition_of(one, manifest, pool))
        for one in single_teacher_recipes(recipe)
    ]


def gate(recipe: Recipe, step: int = 0) -> str:
    return require_parity(
        recipe, manifest_of(recipe), load_backgrounds(recipe), caches_of(recipe), step
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("parity")
    write_persons(folder / "persons", NUM_IMAGES)
    recipe = tiny_recipe(folder, parity_samples=SAMPLES)
    fill_cache(recipe)
    return recipe


@pytest.fixture
def recipe(made: Recipe, tmp_path: Path) -> Recipe:
    """The made one with a cache and a run folder of its own."""
    url = tmp_path / "targets"
    shutil.copytree(made.cache.url, url)
    return changed(made, cache={"url": str(url)}).model_copy(update={"output": str(tmp_path)})


def seal(record: np.ndarray, layout: RecordLayout) -> None:
    """Give a changed record uint8 [R] the checksum of its new content."""
    crc = np.uint32(zlib.crc32(record[: layout.crc_start].tobytes()))
    record[layout.crc_start : layout.num_bytes] = np.frombuffer(crc.tobytes(), np.uint8)


def tamper(recipe: Recipe, cache: TargetCache, series: str = "view") -> tuple[str, str]:
    """Shift the codes of one patch of a record that the gate looks at; its series and key."""
    manifest, plan = manifest_of(recipe), ViewPlan(recipe.seed, recipe.views)
    place = draw_places(recipe, manifest, SAMPLES, 0)[1]
    ref = manifest.shards[place.shard]
    key = cache.shard("view-0", ref).keys[place.row]
    index = (plan.view_index if series == "view" else plan.composite_index)(key, place.epoch)
    name = f"{series}-{index}"
    layout, path = cache.layout(name), Path(cache.store.path(f"{name}/{ref.name}"))
    data = np.fromfile(path, dtype=np.uint8)
    start = place.row * stride_of(layout) + 512
    record = data[start : start + layout.num_bytes]
    codes = record[layout.code_start : layout.code_start + layout.width].view(np.int8)
    codes[:] = np.roll(codes, 5)
    seal(record, layout)
    data.tofile(path)
    TargetShard(data.tobytes(), layout, name).records([place.row])  # its checksum is right
    return name, key


def averaged(image: np.ndarray, spec: ViewSpec, size: tuple[int, int]) -> np.ndarray:
    box: Box = spec.box
    cut = image[box.top : box.top + box.height, box.left : box.left + box.width]
    resized = np.asarray(Image.fromarray(cut).resize(size[::-1], Image.Resampling.BOX))
    return resized[:, ::-1] if spec.flip else resized


@pytest.mark.parametrize("codec", ["fp16", "fp32", "pca64-int4"])
def test_a_fresh_cache_passes_under_every_codec(made: Recipe, tmp_path: Path, codec: str) -> None:
    own = changed(made, cache={"codec": codec, "url": str(tmp_path)})
    own = own.model_copy(update={"output": str(tmp_path)})
    fill_cache(own)
    assert f"{SAMPLES} samples, {SAMPLES * (1 + 32 + 1 + 64)} tokens" in gate(own)


@pytest.mark.parametrize("arm", ARMS)
def test_a_fresh_cache_passes_with_every_kind_of_composite_and_noise(
    tmp_path: Path, arm: str
) -> None:
    write_persons(tmp_path / "persons", NUM_IMAGES)
    own = arm_recipe(tmp_path, arm, train={"parity_samples": SAMPLES})
    fill_cache(own)
    assert "cosine 1.0000" in gate(own)


def test_every_teacher_is_compared_and_the_wrong_one_is_named(tmp_path: Path) -> None:
    write_persons(tmp_path / "persons", NUM_IMAGES)
    values = tiny_values(tmp_path, parity_samples=SAMPLES)
    more = {"more_teachers": [values["teacher"] | {"tap": "block3"}]}
    own = resolve_recipe({**values, **more, "loss": {"targets": "standardised"}})
    build_shards.run(own)
    for single in single_teacher_recipes(own):
        fill_cache(single)
    first, second = caches_of(own)
    assert len(gate(own).splitlines()) == 2
    RunLayout(own.run_dir).parity.unlink()
    name, key = tamper(own, second)
    with pytest.raises(DataError, match=f"{second.store.url}.*{name} of sample '{key}'"):
        gate(own)
    assert first.store.url != second.store.url


@pytest.mark.parametrize("series", ["view", "composite"])
def test_a_tampered_record_stops_the_run_and_is_named(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], series: str
) -> None:
    name, key = tamper(recipe, caches_of(recipe)[0], series)
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    answer = call(capsys, "train", path)
    assert answer.code == EXIT_DATA
    assert f"{name} of sample '{key}' is the worst" in answer.sentence
    assert "every field of its header agrees with this run" in answer.sentence
    assert not RunLayout(recipe.run_dir).checkpoints.exists()
    assert not RunLayout(recipe.run_dir).parity.exists()

    report = tmp_path / "parity.json"
    answer = call(capsys, "parity", path, "-n", str(SAMPLES), "--json", report)
    assert answer.code == EXIT_DATA
    (told,) = json.loads(report.read_text())["teachers"]
    assert not told["passed"]
    assert told["worst"] == f"{name} of sample '{key}'"


def test_another_interpolation_is_found(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned_samples, "render", averaged)
    with pytest.raises(DataError, match=r"median 0\..*look at the hardware"):
        gate(recipe)


def test_the_software_that_changed_since_is_named(recipe: Recipe) -> None:
    (cache,) = caches_of(recipe)
    tamper(recipe, cache)
    path = cache.store.path("made_with.json")
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "pillow": "1.2.3", "unheard": "4"}))
    with pytest.raises(DataError, match=r"other software: pillow \('.*' here, '1.2.3' there\); "):
        gate(recipe)
    path.unlink()
    with pytest.raises(DataError, match="so look at libraries, hardware and precision"):
        gate(recipe)


def test_a_cache_of_other_weights_is_told_by_the_field_of_its_header(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_teacher(tmp_path / "other.safetensors", seed=1)
    own = changed(recipe, teacher={"weights": str(other)})
    answer = call(capsys, "train", write_recipe(own, tmp_path / "recipe.yaml"))
    assert answer.code == EXIT_DATA
    assert "there differs in teacher.weights ('" in answer.sentence
    assert "teacher.tap" not in answer.sentence


def test_the_gate_can_be_turned_off(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper(recipe, caches_of(recipe)[0])
    monkeypatch.setattr(meter, "teacher_of", None)  # nobody loads a teacher
    assert gate(changed(recipe, train={"parity_samples": 0})) == ""


def test_what_passed_is_not_compared_again_until_something_changes(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    original = meter.teacher_of
    monkeypatch.setattr(meter, "teacher_of", lambda one: measured.append(1) or original(one))
    assert "4 samples" in gate(recipe)
    assert "compared with the teacher before" in gate(recipe, step=7)
    assert len(measured) == 1
    gate(changed(recipe, train={"parity_samples": 2}))
    assert len(measured) == 2
    monkeypatch.setattr(parity, "software", lambda: {"torch": "0"})
    gate(recipe)
    assert len(measured) == 3
    RunLayout(recipe.run_dir).parity.write_text("{")  # a damaged note notes nothing
    gate(recipe)
    assert len(measured) == 4


def test_training_draws_the_same_numbers_after_the_gate(recipe: Recipe) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    gate(recipe)
    assert torch.equal(torch.rand(4), expected)


def test_pixels_of_the_device_renderer_pass_too(recipe: Recipe) -> None:
    told = gate(changed(recipe, train={"render": "device"}))
    assert "cosine 1.0000" in told


def test_an_unfinished_cache_is_compared_as_far_as_it_goes(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache,) = caches_of(recipe)
    refs = manifest_of(recipe).shards
    for ref in refs[1:]:
        cache.store.delete(f"ledger/{ref.name.removesuffix('.tar')}.json")
        cache.store.delete(f"view-0/{ref.name}")
    assert run_parity(recipe, SAMPLES) == EXIT_DONE
    told = capsys.readouterr().out
    assert "relation: " in told
    cache.store.delete(f"ledger/{refs[0].name.removesuffix('.tar')}.json")
    with pytest.raises(DataError, match="no shard has all of its targets yet"):
        run_parity(recipe, SAMPLES)


def test_samples_differ_by_seed_and_cover_shards(made: Recipe) -> None:
    manifest = manifest_of(made)
    first, again, other = (draw_places(made, manifest, 8, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({place.shard for place in first}) == 2
    assert len(set(draw_places(made, manifest, 12, 0))) == 12
    assert len(draw_places(made, manifest, 90, 0)) == 90


def test_damaged_samples_are_left_to_the_training_loader(recipe: Recipe) -> None:
    """A record that fails its checksum is no disagreement: the next sample is compared."""
    (cache,) = caches_of(recipe)
    for path in Path(cache.store.url).glob("*/persons-000000.tar"):
        layout = cache.layout(path.parent.name)
        data = bytearray(path.read_bytes())
        for row in range(0, 10, 2):
            data[row * stride_of(layout) + 512 + layout.code_start] ^= 1
        path.write_bytes(data)
    assert "cosine 1.0000" in gate(changed(recipe, data={"max_skip_fraction": 0.5}))


def test_a_shard_of_damaged_samples_alone_is_told(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_args: object, **_named: object) -> np.ndarray:
        raise DataError("it is damaged")

    monkeypatch.setattr(places, "decode_rgb", damaged)
    with pytest.raises(DataError, match="holds damaged samples alone"):
        gate(recipe)
