"""Facts of persons move with a crop: against plain NumPy on random facts."""

import numpy as np
import pytest

from data_tools.person_facts import moved


@pytest.mark.parametrize("seed", range(5))
def test_boxes_points_and_polygons_are_those_of_the_crop(seed: int) -> None:
    random = np.random.default_rng(seed)
    left, top = (round(float(x), 1) for x in random.uniform(0, 30, 2))
    width, height = (int(x) for x in random.integers(5, 40, 2))
    corner = random.uniform(-10, 60, (6, 2))
    boxes = np.concatenate([corner, corner + random.uniform(1, 30, (6, 2))], 1)  # [6, 4]
    points = np.concatenate(
        [random.uniform(0, 80, (6, 17, 2)), random.integers(0, 3, (6, 17, 1))], 2
    )
    polygon = random.uniform(0, 80, (7, 2))
    told = moved(
        {
            "boxes": boxes.tolist(),
            "keypoints": [*points.tolist()[:5], None],
            "masks": [[polygon.ravel().tolist()], None],
            "identity": "p1",
        },
        left,
        top,
        width,
        height,
    )
    cut = (boxes - [left, top, left, top]).clip(0, [width, height, width, height])
    inside = (cut[:, 0] < cut[:, 2]) & (cut[:, 1] < cut[:, 3])
    assert [box is not None for box in told["boxes"]] == inside.tolist()
    kept = np.array([box for box in told["boxes"] if box is not None]).reshape(-1, 4)
    assert np.abs(kept - cut[inside]).max(initial=0) <= 0.0051
    assert np.abs(np.array(told["keypoints"][:5]) - (points[:5] - [left, top, 0])).max() <= 0.0051
    assert told["keypoints"][5] is None
    assert np.abs(np.reshape(told["masks"][0], (7, 2)) - (polygon - [left, top])).max() <= 0.0051
    assert told["masks"][1] is None
    assert told["identity"] == "p1"


def test_a_run_length_mask_stays_whole_and_says_where_the_crop_is() -> None:
    mask = {"size": [40, 24], "counts": "abc"}
    once = moved({"masks": [mask]}, 3, 4, 10, 10)
    assert once["masks"] == [{**mask, "offset": [3, 4]}]
    assert moved(once, 1, 2, 5, 5)["masks"] == [{**mask, "offset": [4, 6]}]
    assert "offset" not in mask
