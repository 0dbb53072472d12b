"""Views rendered in batches are Pillow's, pixel for pixel: Pillow is what they are held to."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpal import pass_order as orders
from dpal.base.errors import ConfigError
from dpal.base.inputs import Views
from dpal.batch import Pairs, Pictures, RawBatch
from dpal.device_render import DeviceRenderer
from dpal.pass_order import pass_order
from dpal.resample import render_boxes, upload
from dpal.views.plan import ViewPlan
from dpal.views.render import render, render_composite
from dpal.views.specs import Box, ViewSpec

ORDER = pass_order()
CPU = torch.device("cpu")


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Half of all images are black and white: what overshoots is then cut off."""
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if rng.random() < 0.5 else image


def random_view(rng: np.random.Generator, image: np.ndarray) -> ViewSpec:
    """Any box of an image: one in five is the whole of it, one in five a few pixels."""
    high, wide = image.shape[:2]
    most = {0: 1.0, 1: 0.05}.get(int(rng.integers(5)), float(rng.random()))
    height, width = (max(1, round(side * most * rng.uniform(0.5, 1))) for side in (high, wide))
    if most == 1.0:
        height, width = high, wide
    top, left = int(rng.integers(high - height + 1)), int(rng.integers(wide - width + 1))
    return ViewSpec(Box(top, left, height, width), flip=bool(rng.random() < 0.5))


def joined(images: Sequence[np.ndarray]) -> Pictures:
    sizes = np.array([image.shape[:2] for image in images])
    return Pictures(np.concatenate([image.reshape(-1, 3) for image in images]), sizes)


def numbers(picture: int, view: ViewSpec) -> list[int]:
    return [picture, *view.box, int(view.flip)]


def in_batch(
    images: Sequence[np.ndarray], views: Sequence[tuple[int, ViewSpec]], size: tuple[int, int]
) -> np.ndarray:
    rows = np.array([numbers(*view) for view in views])
    return render_boxes(upload(joined(images), CPU), rows, size, ORDER).numpy()


@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(1, 140), st.integers(1, 140)))
@settings(max_examples=60, deadline=None)
def test_a_batch_of_boxes_of_images_of_many_sizes_is_pillows(
    seed: int, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    images = [noise(rng, *(int(n) for n in rng.integers(1, 260, 2))) for _ in range(3)]
    views = [(i % 3, random_view(rng, images[i % 3])) for i in range(6)]
    drawn = in_batch(images, views, size)
    for pixels, (picture, view) in zip(drawn, views, strict=True):
        assert np.array_equal(pixels, render(images[picture], view, size))


@given(st.integers(9, 90), st.integers(9, 90))
@example(20, 14)  # the height loses exactly twice as much as the width
@example(21, 14)
@settings(max_examples=60, deadline=None)
def test_the_axis_that_pillow_resizes_first_is_first(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    view = ViewSpec(Box(1, 1, height - 2, width - 2), flip=False)
    assert np.array_equal(in_batch([image], [(0, view)], (8, 8))[0], render(image, view, (8, 8)))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 20000), (4, 16)), ((20000, 3), (16, 4)), ((9, 4096), (8, 32)), ((1500, 1100), (64, 32))],
)
def test_images_that_shrink_a_thousandfold_are_pillows(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    image = np.random.default_rng(1).integers(0, 2, (*shape, 3)).astype(np.uint8) * 255
    whole = ViewSpec(Box(0, 0, *shape), flip=True)
    assert np.array_equal(in_batch([image], [(0, whole)], size)[0], render(image, whole, size))


def test_a_view_does_not_depend_on_what_is_rendered_beside_it_nor_on_autocast() -> None:
    rng = np.random.default_rng(2)
    images = [noise(rng, int(rng.integers(20, 400)), int(rng.integers(20, 200))) for _ in range(40)]
    views = [(i, random_view(rng, image)) for i, image in enumerate(images)]
    with torch.autocast("cpu", torch.bfloat16):
        together = in_batch(images, views, (128, 64))  # more than one portion
    for (i, view), pixels in zip(views, together, strict=True):
        assert np.array_equal(in_batch(images, [(i, view)], (128, 64))[0], pixels)
        assert np.array_equal(render(images[i], view, (128, 64)), pixels)


def raw_batch(
    plan: ViewPlan, images: list[np.ndarray], pool: list[np.ndarray], *, pairs: bool = True
) -> RawBatch:
    """Base view and crops of each image, and a composite of it."""
    sizes = [image.shape[:2] for image in pool]
    keys = [f"{i:08x}" for i in range(len(images))]
    base, crops, specs = [], [], []
    for i, (key, image) in enumerate(zip(keys, images, strict=True)):
        base.append(numbers(i, plan.base(key, 0, image.shape[:2])))
        crops.append([numbers(i, crop) for crop in plan.crops(key, 0, 0, image.shape[:2])])
        specs.append(plan.composite(key, 0, image.shape[:2], sizes))
    drawn = Pairs(
        np.array([numbers(spec.background, spec.background_view) for spec in specs]),
        np.array([[numbers(i, view) for view in spec.persons] for i, spec in enumerate(specs)]),
        np.array([spec.corners for spec in specs]),
    )
    return RawBatch(
        keys=tuple(keys),
        originals=joined(images),
        base=np.array(base),
        crops=np.array(crops),
        pairs=drawn if pairs else None,
        composite=np.zeros((len(images), 0, 0, 3), np.uint8),
        backgrounds=joined(pool),
        photometric=np.zeros((len(images), 4, 6), np.float32),
        records=(),
        regions=np.zeros((len(images), 2, 4), np.float32),
    )


@pytest.mark.parametrize("seed", range(4))
def test_composites_are_those_of_the_loader(seed: int) -> None:
    rng, plan = np.random.default_rng(seed), ViewPlan(seed, Views(height=128, width=64))
    images = [noise(rng, *(int(n) for n in rng.integers(40, 300, 2))) for _ in range(5)]
    pool = [noise(rng, *(int(n) for n in rng.integers(60, 300, 2))) for _ in range(3)]
    batch = DeviceRenderer(plan)(raw_batch(plan, images, pool), CPU)
    sizes = [image.shape[:2] for image in pool]
    assert batch.composite.dtype == torch.uint8
    for i, (key, image) in enumerate(zip(batch.keys, images, strict=True)):
        spec = plan.composite(key, 0, image.shape[:2], sizes)
        expected = render_composite(image, pool[spec.background], spec, plan)
        assert np.array_equal(batch.composite[i].numpy(), expected)


def test_every_mixture_of_two_values_is_that_of_render_composite() -> None:
    plan = ViewPlan(0, Views(height=512, width=256))
    renderer, values = DeviceRenderer(plan), np.arange(256, dtype=np.uint8)
    table = renderer._blend_table(CPU).numpy()
    exact = 7 * values[:, None].astype(np.int64) + 3 * values.astype(np.int64)  # in tenths
    assert np.abs(10 * table.astype(np.int64) - exact).max() <= 5
    for person in (0, 1, 100, 255):
        mixed = 0.7 * np.full(256, person, np.uint8) + (1 - 0.7) * values
        assert np.array_equal(table[person], np.rint(mixed).astype(np.uint8))


def test_the_pool_of_backgrounds_is_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpal import device_render

    asked: list[int] = []

    def counted(pictures: Pictures, device: torch.device) -> object:
        asked.append(len(pictures.sizes))
        return upload(pictures, device)

    monkeypatch.setattr(device_render, "upload", counted)
    rng, plan = np.random.default_rng(0), ViewPlan(0, Views(height=128, width=64))
    first = raw_batch(plan, [noise(rng, 90, 50)], [noise(rng, 99, 80)] * 2)
    renderer = DeviceRenderer(plan)
    for _ in range(3):
        renderer(first, CPU)
    assert sorted(asked) == [1, 1, 1, 2]


def test_without_composites_there_is_none() -> None:
    rng, plan = np.random.default_rng(0), ViewPlan(0, Views(height=128, width=64))
    raw = raw_batch(plan, [noise(rng, 90, 50)], [noise(rng, 99, 80)], pairs=False)
    assert DeviceRenderer(plan)(raw, CPU).composite.shape == (1, 0, 0, 3)


def test_a_pillow_that_resizes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def brighter(image: np.ndarray, spec: ViewSpec, size: tuple[int, int]) -> np.ndarray:
        return np.minimum(render(image, spec, size), 254) + 1

    monkeypatch.setattr(orders, "render", brighter)
    with pytest.raises(ConfigError, match=r"train\.render=device: Pillow .* train\.render=loader"):
        pass_order()


@pytest.mark.parametrize("known", [orders._lower, orders._slender, orders._never])
def test_each_known_order_of_passes_is_told_from_the_others(
    monkeypatch: pytest.MonkeyPatch, known: orders.PassOrder
) -> None:
    """As if the Pillow of that version was installed; each was also compared to real ones once."""

    def of_that_version(image: np.ndarray, spec: ViewSpec, size: tuple[int, int]) -> np.ndarray:
        rows = np.array([numbers(0, spec)])
        return render_boxes(upload(joined([image]), CPU), rows, size, known)[0].numpy()

    monkeypatch.setattr(orders, "render", of_that_version)
    assert pass_order() is known
