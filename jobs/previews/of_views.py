"""Pictures of what the student sees: views of single persons, and composites."""

import numpy as np
import torch
from PIL import Image

from dpal.augment import add_noise
from dpal.views.plan import BLUR_PROBABILITY
from dpal.views.render import render
from dpal.visualize import PLATE, Picture, mosaic
from jobs.previews.sample import Drawn, Sample


def draw_views(sample: Sample) -> Drawn:
    """Source image, base views, local crops, and the same view under colour noise."""
    plan, height = sample.plan, sample.plan.size[0]
    sources, pinned, crops = [], [], []
    for key, image in zip(sample.keys, sample.images, strict=True):
        source = image.shape[:2]
        sources.append(_fit(image, plan.size))
        last = plan.base(key, plan.views.count - 1, source)
        pinned.append(render(image, last, plan.size))
        cuts = [render(image, cut, plan.crop_size) for cut in plan.crops(key, 0, 0, source)[:2]]
        crops.append(centred(np.concatenate(cuts), plan.size))
    rows, labels = [sources, list(sample.bases)], ["source", "base view 1"]
    if plan.views.count > 1:
        rows.append(pinned)
        labels.append(f"base view {plan.views.count}")
    rows.append(crops)
    labels.append("local crops")
    if plan.views.photometric != "off":
        rows.append(list(_noisy(sample)))
        labels.append("with noise")
    noise = {
        "free": ", and colour noise that the teacher does not see.",
        "pinned": ". Teacher and student see the same colour noise.",
        "off": ".",
    }[plan.views.photometric]
    return Drawn(
        "views",
        "Views of single persons",
        f"Each column is one image. Of single persons the teacher sees only {plan.views.count} "
        f"pinned base views ({height} × {plan.size[1]} pixels, every second one mirrored). The "
        f"student also gets fresh local crops ({plan.crop_size[0]} × {plan.crop_size[1]}), which "
        f"must predict the whole view's global feature{noise}",
        mosaic(rows, row_labels=labels),
    )


def draw_composites(sample: Sample) -> Drawn:
    """Composites of two persons, or of real scenes."""
    chosen = list(sample.composites)
    middle = (len(chosen) + 1) // 2
    kind = sample.plan.views.composite
    made = {
        "same": "A local crop and the base view of one image, blended side by side (70 % person) "
        "over a background.",
        "two": "A local crop of one image and the base view of another, blended side by side "
        "(70 % person) over a background.",
        "scenes": "Crops of real images of several persons.",
    }[kind]
    return Drawn(
        "composites",
        "Scenes of several persons" if kind == "scenes" else "Composites of two persons",
        f"{made} From these the student learns how the teacher relates the parts of a scene "
        "with several persons.",
        mosaic([row for row in (chosen[:middle], chosen[middle:]) if row]),
    )


def _noisy(sample: Sample) -> np.ndarray:
    plan = sample.plan
    if plan.views.photometric == "pinned":
        noise = [plan.pinned_photometric(key, "base", 0) for key in sample.keys]
    else:
        noise = [plan.photometric(key, 0, 0, BLUR_PROBABILITY["base"]) for key in sample.keys]
    planes = torch.from_numpy(sample.bases).permute(0, 3, 1, 2).float() / 255
    mixed = add_noise(planes, torch.tensor(noise, dtype=torch.float32)).clamp(0, 1)
    return (mixed * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _fit(image: Picture, size: tuple[int, int]) -> Picture:
    """The whole image inside a plate-coloured frame of `size`."""
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return centred(np.asarray(small), size)


def centred(picture: Picture, size: tuple[int, int]) -> Picture:
    """A picture in the middle of a plate-coloured frame of `size`."""
    frame = np.empty((*size, 3), np.uint8)
    frame[:] = PLATE
    top, left = ((a - b) // 2 for a, b in zip(size, picture.shape[:2], strict=True))
    frame[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return frame
