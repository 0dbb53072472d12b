"""Who is drawn and how they stand: identities and poses as pure functions of numbers."""

import hashlib
import math
from typing import NamedTuple

import numpy as np

Colour = tuple[int, int, int]
Point3 = tuple[float, float, float]

DRAWING_VERSION = 1  # raise it whenever the same numbers would give other pixels

SKIN: tuple[Colour, ...] = ((241, 205, 178), (224, 178, 144), (187, 134, 99), (129, 86, 62))
HAIR: tuple[Colour, ...] = ((32, 27, 26), (84, 56, 38), (146, 104, 60), (122, 118, 116))
CLOTH: tuple[Colour, ...] = (
    (38, 41, 48),
    (228, 226, 220),
    (42, 68, 130),
    (168, 42, 48),
    (112, 116, 122),
    (52, 108, 74),
    (214, 170, 70),
    (196, 122, 142),
)
LOWER: tuple[Colour, ...] = (
    (36, 38, 46),
    (52, 76, 124),
    (176, 158, 122),
    (112, 114, 118),
    (122, 52, 56),
    (84, 98, 70),
)
SHOES: tuple[Colour, ...] = ((34, 32, 34), (228, 226, 222), (120, 78, 50), (168, 56, 54))
BAGS: tuple[Colour, ...] = ((44, 42, 46), (140, 90, 56), (52, 84, 110), (172, 58, 52))

PATTERNS = ("plain", "stripes", "bars", "checks", "dots", "halves")
PRINTS = ("none", "logo", "jacket", "back", "belt")
HAIR_STYLES = ("short", "long", "ponytail", "bun", "bald", "cap", "curls")
SLEEVES = (0.0, 0.55, 1.0)  # share of the arm that is covered
LOWERS = ("trousers", "shorts", "skirt", "dress")
BAG_KINDS = ("none", "backpack", "handbag", "satchel")


class Cloth(NamedTuple):
    """A fabric: colours, a pattern of `PATTERNS`, and its period in body heights."""

    colour: Colour
    second: Colour
    pattern: str
    period: float


class Appearance(NamedTuple):
    """What stays the same in every picture of one identity; lengths in body heights."""

    build: float
    shoulders: float
    hips: float
    legs: float
    head: float
    skin: Colour
    hair: Colour
    hair_style: str
    upper: Cloth
    sleeve: float
    print: str
    print_colour: Colour
    lower_kind: str
    lower: Cloth
    shoes: Colour
    boots: bool
    bag: str
    bag_colour: Colour
    bag_side: int


class Pose(NamedTuple):
    """Joint angles in radians; index 0 is the person's left side (negative x), 1 the right.

    `heading` is where the person looks: 0 at the camera, pi away from it, pi/2 to the right.
    """

    heading: float
    leg_swing: tuple[float, float]
    knee: tuple[float, float]
    arm_swing: tuple[float, float]
    arm_out: tuple[float, float]
    elbow: tuple[float, float]
    lean: float


def generator(seed: int, *words: object) -> np.random.Generator:
    """The random numbers that belong to (seed, words)."""
    text = "/".join(map(str, (seed, *words)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def appearance(seed: int, identity: int) -> Appearance:
    """The looks of `identity`.

    Identities 2g and 2g + 1 wear the same colours and kinds of clothes: they differ in pattern,
    print, hair, proportions, shoes and bag, so colour alone cannot tell them apart.
    """
    shared = generator(seed, "wardrobe", identity // 2)
    lower_kind = LOWERS[shared.choice(4, p=(0.5, 0.18, 0.16, 0.16))]
    colour, second = (CLOTH[i] for i in shared.choice(len(CLOTH), 2, replace=False))
    lower, skin = LOWER[shared.integers(len(LOWER))], SKIN[shared.integers(len(SKIN))]
    sleeve = SLEEVES[shared.choice(3, p=(0.15, 0.4, 0.45))]
    shared_pattern = int(shared.integers(len(PATTERNS)))

    own = generator(seed, "identity", identity)
    step = int(own.integers(3)) + 3 * (identity % 2)  # the two of a pair never share a pattern
    cloth = Cloth(
        colour,
        second,
        PATTERNS[(shared_pattern + step) % len(PATTERNS)],
        float(own.uniform(0.035, 0.07)),
    )
    lower_pattern = PATTERNS[own.choice(4, p=(0.7, 0.1, 0.1, 0.1))]
    return Appearance(
        build=float(own.uniform(0.82, 1.28)),
        shoulders=float(own.uniform(0.88, 1.14)),
        hips=float(own.uniform(0.88, 1.14)),
        legs=float(own.uniform(0.45, 0.505)),
        head=float(own.uniform(0.92, 1.12)),
        skin=skin,
        hair=HAIR[own.integers(len(HAIR))],
        hair_style=HAIR_STYLES[own.choice(7, p=(0.27, 0.2, 0.12, 0.1, 0.07, 0.12, 0.12))],
        upper=cloth,
        sleeve=sleeve,
        print=PRINTS[own.choice(5, p=(0.3, 0.2, 0.2, 0.15, 0.15))],
        print_colour=CLOTH[own.integers(len(CLOTH))],
        lower_kind=lower_kind,
        lower=Cloth(lower, _darker(lower), lower_pattern, float(own.uniform(0.03, 0.06))),
        shoes=SHOES[own.integers(len(SHOES))],
        boots=bool(own.random() < 0.25),
        bag=BAG_KINDS[own.choice(4, p=(0.4, 0.25, 0.15, 0.2))],
        bag_colour=BAGS[own.integers(len(BAGS))],
        bag_side=int(own.integers(2)),
    )


def pose(rng: np.random.Generator) -> Pose:
    """A random pose: walking, standing, arms raised, on the phone, or hands on the hips."""
    heading = float(rng.choice((0.0, 0.5, 1.0, 1.5))) * math.pi + float(rng.normal(0, 0.35))
    kind = rng.choice(5, p=(0.5, 0.2, 0.1, 0.1, 0.1))
    phase = rng.uniform(0, 2 * math.pi)
    stride = rng.uniform(0.3, 0.55) if kind == 0 or rng.random() < 0.4 else rng.uniform(0, 0.08)
    swing = stride * math.sin(phase)
    knees = [float(max(0.0, stride * math.cos(phase + k * math.pi)) + 0.03) for k in (0, 1)]
    arms = [-0.9 * swing, 0.9 * swing]
    out = [float(rng.uniform(0.06, 0.2)) for _ in (0, 1)]
    elbows = [float(rng.uniform(0.1, 0.5)) for _ in (0, 1)]
    side = int(rng.integers(2))
    if kind == 2:
        for k in (0, 1):
            if k == side or rng.random() < 0.4:
                out[k], arms[k], elbows[k] = float(rng.uniform(1.9, 2.8)), 0.1, 0.2
    elif kind == 3:
        arms[side], elbows[side], out[side] = 0.5, 2.1, 0.25
    elif kind == 4:
        out = [0.75, 0.75]
        elbows = [-1.0, -1.0]  # a negative angle bends the forearm inwards instead of forwards
    return Pose(
        heading=heading,
        leg_swing=(float(swing), float(-swing)),
        knee=(knees[0], knees[1]),
        arm_swing=(float(arms[0]), float(arms[1])),
        arm_out=(out[0], out[1]),
        elbow=(elbows[0], elbows[1]),
        lean=float(rng.normal(0, 0.03)),
    )


class Skeleton(NamedTuple):
    """Joints [x right, y up, z towards the camera] in body heights, feet on y = 0."""

    hip: tuple[Point3, Point3]
    knee: tuple[Point3, Point3]
    ankle: tuple[Point3, Point3]
    toe: tuple[Point3, Point3]
    shoulder: tuple[Point3, Point3]
    elbow: tuple[Point3, Point3]
    hand: tuple[Point3, Point3]
    pelvis: Point3
    neck: Point3
    head: Point3


def skeleton(looks: Appearance, posed: Pose) -> Skeleton:
    """Forward kinematics in the body frame, then a turn about the vertical by `heading`."""
    leg, cos, sin = looks.legs / 2, math.cos, math.sin
    parts: dict[str, list[Point3]] = {
        name: [] for name in ("hip", "knee", "ankle", "toe", "shoulder", "elbow", "hand")
    }
    top = 0.815
    for side, sign in ((0, -1.0), (1, 1.0)):
        hip = (sign * 0.05 * looks.hips * looks.build, looks.legs, 0.0)
        swing, bend = posed.leg_swing[side], posed.knee[side]
        knee = _move(hip, leg, (sign * 0.03, -cos(swing), sin(swing)))
        low = swing - bend
        ankle = _move(knee, leg - 0.03, (0.0, -cos(low), sin(low)))
        toe = _move(ankle, 0.085, (sign * 0.25, -0.25 - 0.5 * sin(bend), 0.95))
        wide = 0.1 * looks.shoulders * (0.7 + 0.3 * looks.build)
        shoulder = (sign * wide, top - 0.03, 0.0)
        out, forward, bend = posed.arm_out[side], posed.arm_swing[side], posed.elbow[side]
        upper = (sign * sin(out), -cos(out) * cos(forward), cos(out) * sin(forward))
        elbow = _move(shoulder, 0.165, upper)
        if bend < 0:
            lower = (-sign * sin(-bend), -cos(bend), 0.25)
        else:
            lower = (sign * sin(out), -cos(out) * cos(forward + bend), sin(forward + bend))
        hand = _move(elbow, 0.15, lower)
        for name, joint in zip(parts, (hip, knee, ankle, toe, shoulder, elbow, hand), strict=True):
            parts[name].append(joint)
    ground = min(joint[1] for joint in parts["ankle"]) - 0.035
    shift = posed.lean
    pelvis, neck, head = (0.0, looks.legs, 0.0), (shift, top + 0.03, 0.0), (shift, 0.925, 0.012)

    def turn(joint: Point3) -> Point3:
        x, y, z = joint
        c, s = cos(posed.heading), sin(posed.heading)
        return x * c + z * s, y - ground, z * c - x * s

    pairs = {name: (turn(a), turn(b)) for name, (a, b) in parts.items()}
    return Skeleton(**pairs, pelvis=turn(pelvis), neck=turn(neck), head=turn(head))


def _move(start: Point3, length: float, direction: Point3) -> Point3:
    norm = math.sqrt(sum(value * value for value in direction)) or 1.0
    x, y, z = (s + length * d / norm for s, d in zip(start, direction, strict=True))
    return x, y, z


def _darker(colour: Colour) -> Colour:
    red, green, blue = (int(value * 0.62) for value in colour)
    return red, green, blue


def shaded(colour: Colour, factor: float) -> Colour:
    """A colour made darker, or brighter by a factor above 1."""
    red, green, blue = (min(int(value * factor), 255) for value in colour)
    return red, green, blue
