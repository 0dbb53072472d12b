"""Paint one articulated figure: limbs, clothes, hair, prints and bags, sorted by depth."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from data_tools.synthetic.appearance import (
    Appearance,
    Point3,
    Pose,
    Skeleton,
    shaded,
    skeleton,
)
from data_tools.synthetic.canvas import (
    ARMS,
    BAG,
    FACE,
    HAIR,
    LEGS,
    LOWER,
    SHOES,
    UPPER,
    Canvas,
    Layer,
    Point,
)


class _Figure(NamedTuple):
    """What every drawing step needs: the board, the looks, the joints, and the direction."""

    canvas: Canvas
    looks: Appearance
    body: Skeleton
    facing: float  # 1 towards the camera, -1 away from it
    turned: float  # 1 to the right, -1 to the left

    def across(self, half_width: float, depth: float) -> float:
        """Projected half width of a body part with an elliptic cross-section."""
        return math.hypot(half_width * self.facing, depth * self.turned)


def paint_figure(
    looks: Appearance, posed: Pose, size: tuple[int, int], scale: float, foot: Point
) -> Layer:
    """Paint a person.

    Args:
        size: height and width of the layer in pixels.
        scale: pixels per body height.
        foot: (x, y) pixel where the person stands.
    """
    body = skeleton(looks, posed)
    figure = _Figure(
        Canvas(size, scale, foot), looks, body, math.cos(posed.heading), math.sin(posed.heading)
    )
    steps: list[tuple[float, Callable[[], None]]] = [
        (0.0, partial(_torso, figure)),
        (0.06, partial(_head, figure)),
    ]
    for side in (0, 1):
        leg = body.knee[side][2] + 0.3 * body.hip[side][2]
        arm = body.elbow[side][2] + 0.5 * body.hand[side][2]
        steps.append((leg - 1.0, partial(_leg, figure, side)))
        steps.append((arm + 0.02, partial(_arm, figure, side)))
    if looks.hair_style in ("long", "ponytail"):
        steps.append((-0.02 if figure.facing > 0.1 else 0.08, partial(_back_hair, figure)))
    if looks.bag == "backpack":
        steps.append((-0.01 if figure.facing > 0 else 0.04, partial(_backpack, figure)))
    elif looks.bag != "none":
        joint = body.hand if looks.bag == "handbag" else body.hip
        depth = joint[looks.bag_side][2]
        steps.append((depth + 0.01 if depth > -0.02 else -2.0, partial(_hand_bag, figure)))
    for _, draw in sorted(steps, key=lambda step: step[0]):
        draw()
    return figure.canvas.finish()


def _leg(figure: _Figure, side: int) -> None:
    canvas, looks, body = figure.canvas, figure.looks, figure.body
    hip, knee, ankle, toe = (joints[side] for joints in (body.hip, body.knee, body.ankle, body.toe))
    thick = 0.75 + 0.25 * looks.build
    relief = 175 if knee[2] >= body.knee[1 - side][2] else 95
    trousers = looks.lower_kind == "trousers"
    shoe_top = ankle if not looks.boots or trousers else _between(knee, ankle, 0.55)
    canvas.capsule(shoe_top, ankle, (0.031 * thick, 0.027), SHOES, looks.shoes, relief)
    canvas.capsule(_lift(ankle, -0.012), toe, (0.026, 0.017), SHOES, looks.shoes, relief)
    end = _between(knee, ankle, 0.9 if trousers else 0.97) if shoe_top is ankle else shoe_top
    if trousers:
        upper, shin = looks.lower, looks.lower
        canvas.capsule(knee, end, (0.043 * thick, 0.033), LOWER, shin, relief)
    else:
        canvas.capsule(knee, end, (0.036 * thick, 0.022 * thick), LEGS, looks.skin, relief)
        upper = looks.lower
    if looks.lower_kind in ("trousers", "shorts"):
        stop = knee if trousers else _between(hip, knee, 0.9)
        if not trousers:
            canvas.capsule(hip, knee, (0.055 * thick, 0.037 * thick), LEGS, looks.skin, relief)
        radii = (0.066 * thick, (0.043 if trousers else 0.055) * thick)
        canvas.capsule(hip, stop, radii, LOWER, upper, relief)
    else:
        canvas.capsule(hip, knee, (0.055 * thick, 0.037 * thick), LEGS, looks.skin, relief)


def _torso(figure: _Figure) -> None:
    canvas, looks, body = figure.canvas, figure.looks, figure.body
    wide, hips = looks.build, looks.hips * looks.build
    x, top = body.neck[0], body.neck[1] - 0.03
    base, waist = body.pelvis[1], 0.5 * (body.pelvis[1] + top) - 0.02
    shoulder = figure.across(0.112 * looks.shoulders * (0.7 + 0.3 * wide), 0.07 * wide)
    chest = figure.across(0.1 * wide, 0.078 * wide)
    belly = figure.across(0.086 * wide, 0.07 * wide)
    hip = figure.across(0.1 * hips, 0.078 * hips)
    if looks.lower_kind in ("skirt", "dress"):
        _skirt(figure, belly, hip, waist)
    else:
        seat = [(-belly, waist), (-hip, base), (-hip * 0.7, base - 0.05)]
        canvas.polygon(_closed(seat, 0.5 * x), LOWER, looks.lower, 140)
    hem = waist + 0.01 if looks.lower_kind == "dress" else base + 0.005
    canvas.capsule(
        (body.head[0], body.head[1] - 0.05), (x, top), (0.03, 0.038), FACE, looks.skin, 120
    )
    half = [
        (-0.035, top + 0.022),
        (-shoulder * 0.75, top + 0.012),
        (-shoulder, top - 0.02),
        (-chest, top - 0.11),
        (-belly, waist),
        (-(belly if looks.lower_kind == "dress" else hip * 1.02), hem),
    ]
    canvas.polygon(_closed(half, x), UPPER, looks.upper, 140)
    _decorate(figure, x, top, waist, hem, chest)


def _skirt(figure: _Figure, belly: float, hip: float, waist: float) -> None:
    looks, body = figure.looks, figure.body
    dress = looks.lower_kind == "dress"
    hem = body.pelvis[1] - (0.24 if dress else 0.17)
    knees = [joint[0] for joint in body.knee]
    flare = 0.03 if dress else 0.015
    left, right = min(*knees, -hip) - flare, max(*knees, hip) + flare
    outline = [
        (-belly, waist + 0.01),
        (-hip * 1.04, body.pelvis[1]),
        (left, hem),
        ((left + right) / 2, hem - 0.012),
        (right, hem),
        (hip * 1.04, body.pelvis[1]),
        (belly, waist + 0.01),
    ]
    figure.canvas.polygon(outline, LOWER, looks.upper if dress else looks.lower, 150)


def _decorate(
    figure: _Figure, x: float, top: float, waist: float, hem: float, chest: float
) -> None:
    """What is seen from one side only: logo, open jacket, back print, straps, belt."""
    canvas, looks, facing, turned = figure.canvas, figure.looks, figure.facing, figure.turned
    colour = looks.print_colour
    centre = x + 0.07 * turned
    if looks.print == "logo" and facing > 0.2:
        canvas.ellipse((centre, top - 0.09), (0.04 * facing, 0.036), UPPER, colour, 140)
    elif looks.print == "jacket" and facing > 0.2:
        wide = 0.032 * facing
        strip = [(-wide, top + 0.02), (-wide * 0.8, hem)]
        canvas.polygon(_closed(strip, centre), UPPER, colour, 132)
    elif looks.print == "back" and facing < -0.2:
        wide = 0.06 * facing
        block = [(wide, top - 0.05), (wide, top - 0.13)]
        canvas.polygon(_closed(block, x - 0.07 * turned), UPPER, colour, 140)
    elif looks.print == "belt":
        belt = [(-chest * 0.9, waist - 0.015), (-chest * 0.9, waist - 0.045)]
        canvas.polygon(_closed(belt, x), UPPER, colour, 140)
    if looks.bag == "backpack" and facing > 0.1:
        for sign in (-1, 1):
            strap = sign * 0.065 * facing + centre
            canvas.capsule(
                (strap, top + 0.015), (strap, waist + 0.01), (0.012, 0.012), BAG, looks.bag_colour
            )
    elif looks.bag == "satchel":
        sign = (1 if looks.bag_side == 0 else -1) * (1 if facing > 0 else -1)
        start, end = (x + sign * chest * 0.7, top + 0.01), (x - sign * chest, hem + 0.02)
        canvas.capsule(start, end, (0.009, 0.009), BAG, looks.bag_colour)


def _arm(figure: _Figure, side: int) -> None:
    canvas, looks, body = figure.canvas, figure.looks, figure.body
    shoulder, elbow, hand = body.shoulder[side], body.elbow[side], body.hand[side]
    thick = 0.75 + 0.25 * looks.build
    relief = 205 if elbow[2] >= 0 else 85
    canvas.capsule(elbow, hand, (0.025 * thick, 0.019), ARMS, looks.skin, relief)
    canvas.ellipse((hand[0], hand[1]), (0.021, 0.024), ARMS, looks.skin, relief)
    canvas.capsule(shoulder, elbow, (0.033 * thick, 0.026 * thick), ARMS, looks.skin, relief)
    if looks.sleeve >= 1:
        cuff = _between(elbow, hand, 0.92)
        canvas.capsule(elbow, cuff, (0.033 * thick, 0.026), UPPER, looks.upper, relief)
    if looks.sleeve > 0:
        end = elbow if looks.sleeve >= 1 else _between(shoulder, elbow, looks.sleeve)
        canvas.capsule(shoulder, end, (0.037 * thick, 0.036 * thick), UPPER, looks.upper, relief)


def _head(figure: _Figure) -> None:
    canvas, looks, facing, turned = figure.canvas, figure.looks, figure.facing, figure.turned
    x, y = figure.body.head[0], figure.body.head[1]
    wide, tall = 0.054 * looks.head, 0.07 * looks.head
    style = looks.hair_style
    hair = FACE if style == "bald" else HAIR
    colour = looks.skin if style == "bald" else looks.hair
    puff = 1.22 if style == "curls" else 1.04
    canvas.ellipse((x, y + 0.1 * tall), (wide * puff, tall * puff), hair, colour, 190)
    if style == "bun":
        back = (x - 0.9 * wide * turned, y + 0.95 * tall)
        canvas.ellipse(back, (0.027, 0.027), HAIR, looks.hair, 200)
    if facing > -0.35:
        shift = 0.4 * wide * turned
        face = wide * (0.56 + 0.32 * max(facing, 0.0))
        canvas.ellipse((x + shift, y - 0.14 * tall), (face, 0.82 * tall), FACE, looks.skin, 190)
        _features(figure, x, y, wide, tall)
    if style == "cap":
        _cap(figure, x, y, wide, tall)


def _features(figure: _Figure, x: float, y: float, wide: float, tall: float) -> None:
    canvas, looks = figure.canvas, figure.looks
    heading = math.atan2(figure.turned, figure.facing)
    shade = shaded(looks.skin, 0.72)
    for offset in (-0.42, 0.42):
        if math.cos(heading + offset) > 0.25:
            eye = x + wide * 0.86 * math.sin(heading + offset)
            canvas.ellipse((eye, y - 0.02 * tall), (0.0075, 0.008), FACE, (38, 32, 34), 190)
    nose = x + wide * 1.0 * math.sin(heading)
    if math.cos(heading) > -0.1:
        canvas.ellipse((nose, y - 0.22 * tall), (0.007, 0.013), FACE, shade, 215)
        mouth = x + wide * 0.8 * math.sin(heading)
        radius = 0.016 * max(math.cos(heading), 0.3)
        canvas.ellipse((mouth, y - 0.55 * tall), (radius, 0.005), FACE, (150, 78, 74), 190)


def _cap(figure: _Figure, x: float, y: float, wide: float, tall: float) -> None:
    turns = [math.pi * step / 12 for step in range(13)]
    crown = [
        (x + 1.1 * wide * math.cos(turn), y + 0.34 * tall + 0.9 * tall * math.sin(turn))
        for turn in turns
    ]
    figure.canvas.polygon(crown, HAIR, figure.looks.print_colour, 200)
    if figure.facing > -0.5:
        tip = (x + 1.55 * wide * figure.turned, y + 0.32 * tall - 0.1 * tall * figure.facing)
        brim = shaded(figure.looks.print_colour, 0.75)
        start = (x + 0.4 * wide * figure.turned, y + 0.36 * tall)
        figure.canvas.capsule(
            start, tip, (0.55 * wide * abs(figure.facing) + 0.012, 0.012), HAIR, brim, 215
        )


def _back_hair(figure: _Figure) -> None:
    looks, turned = figure.looks, figure.turned
    x, y = figure.body.head[0], figure.body.head[1]
    wide = 0.054 * looks.head
    if looks.hair_style == "long":
        half = figure.across(1.15 * wide, 0.7 * wide)
        shift = -0.4 * wide * turned
        figure.canvas.capsule(
            (x + shift, y), (x + shift * 1.4, y - 0.13), (half, half * 0.85), HAIR, looks.hair, 165
        )
    else:
        start = (x - 1.0 * wide * turned, y + 0.03)
        end = (x - 1.7 * wide * turned, y - 0.11)
        figure.canvas.capsule(start, end, (0.02, 0.012), HAIR, looks.hair, 215)


def _backpack(figure: _Figure) -> None:
    looks, body = figure.looks, figure.body
    x, top = body.neck[0] - 0.1 * figure.turned, body.neck[1] - 0.045
    half = figure.across(0.085, 0.055)
    low = body.pelvis[1] + 0.05
    outline = [
        (-half * 0.7, top + 0.012),
        (-half, top - 0.03),
        (-half * 1.05, low + 0.03),
        (-half * 0.85, low),
    ]
    figure.canvas.polygon(_closed(outline, x), BAG, looks.bag_colour, 200)
    if figure.facing < -0.2:
        pocket = [(-half * 0.65, low + 0.11), (-half * 0.65, low + 0.03)]
        figure.canvas.polygon(_closed(pocket, x), BAG, shaded(looks.bag_colour, 0.78), 215)


def _hand_bag(figure: _Figure) -> None:
    looks, body, side = figure.looks, figure.body, figure.looks.bag_side
    if looks.bag == "handbag":
        x, y, z = body.hand[side]
        width, height, drop = figure.across(0.03, 0.06), 0.085, 0.035
    else:
        x, y, z = body.hip[side]
        x, y = x * 1.9, y + 0.03
        width, height, drop = figure.across(0.035, 0.065), 0.1, 0.0
    top = y - drop
    if drop:
        for sign in (-1, 1):
            figure.canvas.capsule(
                (x, y), (x + sign * width * 0.6, top), (0.006, 0.006), BAG, looks.bag_colour
            )
    outline = [(-width, top), (-width * 1.1, top - height), (-width * 0.9, top - height - 0.008)]
    figure.canvas.polygon(_closed(outline, x), BAG, looks.bag_colour, 220 if z > 0 else 130)
    flap = [(-width, top), (-width, top - 0.03)]
    figure.canvas.polygon(_closed(flap, x), BAG, shaded(looks.bag_colour, 0.8), 220)


def _closed(left: list[Point], x: float) -> list[Point]:
    """The symmetric outline whose left half, from the top down, is given around 0."""
    return [(x + dx, y) for dx, y in left] + [(x - dx, y) for dx, y in reversed(left)]


def _between(start: Point3, end: Point3, share: float) -> Point3:
    x, y, z = (a + share * (b - a) for a, b in zip(start, end, strict=True))
    return x, y, z


def _lift(point: Point3, height: float) -> Point3:
    return point[0], point[1] + height, point[2]
