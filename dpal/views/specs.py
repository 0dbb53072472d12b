"""What a view is: boxes of source pixels and numbers, never pixels.

A spec says everything that a renderer must know, so that whoever holds the same spec and the same
image sees the same view.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in source pixels; all four fit into uint16."""

    top: int
    left: int
    height: int
    width: int


class ViewSpec(NamedTuple):
    """A box of the source image, resized (bicubic, antialiased) and perhaps flipped."""

    box: Box
    flip: bool


@dataclass(frozen=True)
class CompositeSpec:
    """Two persons, alpha-blended side by side over a background.

    Attributes:
        background: index into the background pool.
        background_view: box of the background image that fills the square composite.
        persons: views of the two persons: a local crop of the image, and a base view of the same
            image or of its partner.
        corners: (top, left) of each person in composite pixels.
        partner: row in the shard of the image that shows the second person; None: the same image.
    """

    background: int
    background_view: ViewSpec
    persons: tuple[ViewSpec, ViewSpec]
    corners: tuple[tuple[int, int], tuple[int, int]]
    partner: int | None = None


class SceneSpec(NamedTuple):
    """A composite that is a crop of a real image of several persons.

    Attributes:
        scene: index into the scene pool.
        view: box of the scene that fills the square composite.
    """

    scene: int
    view: ViewSpec


class Partner(NamedTuple):
    """The image that shows a composite's second person.

    Attributes:
        row: its row in the shard.
        key: its sample key.
        size: its height and width.
    """

    row: int
    key: str
    size: tuple[int, int]


class Photometric(NamedTuple):
    """Colour noise of one view; factors multiply, 0 sigma means no blur."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: bool
    blur_sigma: float
