"""Synthetic persons: labels that are true, pictures that repeat, a data set that survives kills."""

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.synthetic import (
    ATTRIBUTES,
    NUM_CAMERAS,
    PARTS,
    draw_background,
    draw_person,
    draw_scene,
    write_dataset,
)
from data_tools.synthetic.appearance import Cloth, appearance, generator, pose
from data_tools.synthetic.attributes import attributes_of
from data_tools.synthetic.figure import paint_figure
from dpal.base.errors import StorageError
from dpal.base.inputs import Synthetic

SMALL = Synthetic(identities=4, images_per_identity=3, held_out_identities=4)
TIMEOUT_S = 60


def _bytes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _rows(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    write_dataset(folder, SMALL, seed=3)
    return folder


def test_a_picture_depends_on_its_numbers_only() -> None:
    first = draw_person(1, 7, 2)
    draw_person(1, 8, 0)
    again = draw_person(1, 7, 2)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.parts, again.parts)
    for other in (draw_person(2, 7, 2), draw_person(1, 6, 2), draw_person(1, 7, 6)):
        assert not np.array_equal(first.image, other.image)


def test_pictures_carry_their_labels() -> None:
    person = draw_person(0, 5, 6, size=(128, 64))
    assert person.image.shape == (128, 64, 3)
    assert person.image.dtype == np.uint8
    assert person.parts.shape == (128, 64)
    assert (person.identity, person.camera) == (5, 6 % NUM_CAMERAS)


def test_every_part_appears_and_none_is_unnamed() -> None:
    pixels = np.zeros(256, int)
    for identity in range(24):
        pixels += np.bincount(draw_person(0, identity, 0).parts.ravel(), minlength=256)
    assert (pixels[: len(PARTS)] > 0).all()
    assert pixels[len(PARTS) :].sum() == 0


def test_the_mask_lies_on_the_figure() -> None:
    looks = appearance(0, 3)
    red = Cloth((250, 0, 0), (250, 0, 0), "plain", 0.05)
    looks = looks._replace(upper=red, print="none", bag="none", sleeve=1.0)
    layer = paint_figure(looks, pose(generator(0, "p")), (160, 80), 140.0, (40.0, 155.0))
    inside = (layer.parts == PARTS.index("upper_clothes")) & (layer.alpha[..., 0] > 0.99)
    is_red = (layer.pixels[..., 0] > 120) & (layer.pixels[..., 1] < 40)
    assert inside.sum() > 500
    assert is_red[inside].mean() > 0.98
    assert is_red[layer.parts == PARTS.index("lower_clothes")].mean() < 0.05


def test_a_logo_shows_from_the_front_only() -> None:
    looks = appearance(0, 3)._replace(print="logo", print_colour=(0, 255, 0), hair_style="bald")
    looks = looks._replace(bag="none", upper=Cloth((200, 0, 0), (200, 0, 0), "plain", 0.05))
    posed = pose(generator(0, "p"))._replace(arm_swing=(0.0, 0.0), elbow=(0.1, 0.1))

    def green(heading: float) -> int:
        turned = posed._replace(heading=heading)
        pixels = paint_figure(looks, turned, (160, 80), 140.0, (40.0, 155.0)).pixels
        return int(((pixels[..., 1] > 120) & (pixels[..., 0] < 60)).sum())

    assert green(0.0) > 30
    assert green(np.pi) == 0


def test_two_identities_of_a_pair_differ_in_more_than_colour() -> None:
    names = [attribute.name for attribute in ATTRIBUTES]
    for pair in range(30):
        one, two = (
            dict(zip(names, attributes_of(appearance(0, 2 * pair + k)), strict=True))
            for k in (0, 1)
        )
        for shared in ("upper_colour", "upper_second", "lower_colour", "lower_kind", "skin"):
            assert one[shared] == two[shared]
        assert one["upper_pattern"] != two["upper_pattern"]


def test_attributes_stay_within_their_values() -> None:
    for identity in range(200):
        values = attributes_of(appearance(0, identity))
        for attribute, value in zip(ATTRIBUTES, values, strict=True):
            assert 0 <= value < attribute.num_values, attribute.name


def test_colour_alone_does_not_retrieve_an_identity_across_cameras() -> None:
    features, identities, cameras = [], [], []
    for identity in range(30):
        for index in range(4):
            person = draw_person(0, identity, index)
            cells = np.histogramdd(person.image.reshape(-1, 3), bins=8, range=[(0, 256)] * 3)[0]
            features.append(np.sqrt(cells.ravel() / cells.sum()))
            identities.append(identity)
            cameras.append(person.camera)
    similarity = np.stack(features) @ np.stack(features).T
    pid, cam = np.array(identities), np.array(cameras)
    found = []
    for query in range(len(pid)):
        others = cam != cam[query]
        found.append(pid[others][similarity[query][others].argmax()] == pid[query])
    assert np.mean(found) < 0.3


def test_scene_boxes_enclose_the_persons() -> None:
    scene = draw_scene(0, 1, num_persons=3, first_identity=10)
    assert scene.image.shape == (256, 384, 3)
    assert set(scene.identities) <= {10, 11, 12}
    assert len(scene.boxes) == len(scene.identities) > 0
    covered = np.zeros(scene.parts.shape, bool)
    for top, left, height, width in scene.boxes.tolist():
        assert (scene.parts[top : top + height, left : left + width] > 0).any()
        covered[top : top + height, left : left + width] = True
    assert (scene.parts[~covered] == 0).all()


def test_backgrounds_repeat_and_differ() -> None:
    assert np.array_equal(draw_background(0, 1), draw_background(0, 1))
    assert not np.array_equal(draw_background(0, 1), draw_background(0, 2))


def test_evaluation_identities_are_never_taught(dataset: Path) -> None:
    taught = {row["pid"] for row in _rows(dataset / "teach/labels.csv")}
    held_out = {row["pid"] for row in _rows(dataset / "reid/labels.csv")}
    assert (len(taught), len(held_out)) == (4, 4)
    assert not taught & held_out
    split = _rows(dataset / "parsing/labels.csv")
    train = {row["file"].split("-")[0] for row in split if row["split"] == "train"}
    test = {row["file"].split("-")[0] for row in split if row["split"] == "test"}
    assert train
    assert test
    assert not train & test


def test_labels_name_files_that_fit_together(dataset: Path) -> None:
    for folder in ("teach", "parsing"):
        names = json.loads((dataset / folder / "classes.json").read_text())
        assert names == list(PARTS)
        for row in _rows(dataset / folder / "labels.csv"):
            image = Image.open(dataset / folder / row["file"])
            mask = Image.open(dataset / folder / row["mask"])
            assert image.size == mask.size
            assert np.asarray(mask).max() < len(names)
    persons = {path.name for path in (dataset / "persons").iterdir()}
    named = {Path(row["file"]).name for row in _rows(dataset / "teach/labels.csv")}
    assert persons == named
    assert len(persons) == 12


def test_masks_in_the_data_set_are_those_of_the_pictures(dataset: Path) -> None:
    row = _rows(dataset / "reid/labels.csv")[0]
    drawn = draw_person(3, int(row["pid"]), 0)
    stored = np.asarray(Image.open(dataset / "reid" / row["file"]))
    assert np.abs(stored.astype(int) - drawn.image).mean() < 6
    number = int(row["pid"])
    stored_mask = np.asarray(Image.open(dataset / "parsing" / f"{number:05d}-08.png"))
    assert np.array_equal(stored_mask, draw_person(3, number, 8).parts)


def test_a_finished_data_set_is_left_alone(dataset: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*.jpg")}
    write_dataset(dataset, SMALL, seed=3)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*.jpg")} == before


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "synthetic"
    code = (
        "import sys; from pathlib import Path; from dpal.base.inputs import Synthetic;"
        "from data_tools.synthetic import write_dataset;"
        f"write_dataset(Path(sys.argv[1]), Synthetic(**{SMALL.model_dump()}), 3)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(folder.glob("persons/*.jpg"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("persons/*.jpg")}
    assert kept
    assert not (folder / "COMPLETE").exists()
    write_dataset(folder, SMALL, seed=3)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    complete = {k: v for k, v in _bytes(folder).items() if not k.startswith(".aside")}
    assert complete == _bytes(dataset)


def test_another_seed_draws_everything_anew(dataset: Path, tmp_path: Path) -> None:
    size = Synthetic(identities=4, images_per_identity=2, held_out_identities=4)
    folder = tmp_path / "synthetic"
    shutil.copytree(dataset, folder)
    write_dataset(folder, size, seed=4)
    assert len(list((folder / "persons").iterdir())) == 8
    row = _rows(folder / "reid/labels.csv")[0]
    stored = np.asarray(Image.open(folder / "reid" / row["file"])).astype(int)
    assert np.abs(stored - draw_person(4, int(row["pid"]), 0).image).mean() < 6


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_dataset(tmp_path / "file" / "synthetic", SMALL, seed=0)


def test_a_full_disk_is_a_storage_error_and_the_run_goes_on_later(
    small_disk: Path, dataset: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(8 * 2**20 - 2**17))
    with pytest.raises(StorageError, match="No space left"):
        write_dataset(small_disk / "synthetic", SMALL, seed=3)
    ballast.unlink()
    write_dataset(small_disk / "synthetic", SMALL, seed=3)
    complete = _bytes(small_disk / "synthetic")
    assert {k: v for k, v in complete.items() if not k.startswith(".aside")} == _bytes(dataset)
