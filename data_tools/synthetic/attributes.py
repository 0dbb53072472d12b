"""What can be said about a drawn person in words: categorical attributes and where they show."""

from typing import NamedTuple

from data_tools.synthetic.appearance import (
    BAG_KINDS,
    CLOTH,
    HAIR,
    HAIR_STYLES,
    LOWER,
    LOWERS,
    PATTERNS,
    PRINTS,
    SHOES,
    SKIN,
    SLEEVES,
    Appearance,
)


class Attribute(NamedTuple):
    """A categorical label: how many values it takes, and the parts (see PARTS) that show it."""

    name: str
    num_values: int
    parts: tuple[str, ...]


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("upper_colour", len(CLOTH), ("upper_clothes",)),
    Attribute("upper_second", len(CLOTH), ("upper_clothes",)),
    Attribute("upper_pattern", len(PATTERNS), ("upper_clothes",)),
    Attribute("sleeve", len(SLEEVES), ("upper_clothes", "arms")),
    Attribute("print", len(PRINTS), ("upper_clothes",)),
    Attribute("lower_kind", len(LOWERS), ("lower_clothes",)),
    Attribute("lower_colour", len(LOWER), ("lower_clothes",)),
    Attribute("lower_pattern", len(PATTERNS), ("lower_clothes",)),
    Attribute("hair_colour", len(HAIR), ("hair",)),
    Attribute("hair_style", len(HAIR_STYLES), ("hair", "face")),
    Attribute("skin", len(SKIN), ("face", "arms", "legs")),
    Attribute("shoes", len(SHOES), ("shoes",)),
    Attribute("boots", 2, ("shoes",)),
    Attribute("bag", len(BAG_KINDS), ("bag",)),
)


def attributes_of(looks: Appearance) -> tuple[int, ...]:
    """The value of every one of ATTRIBUTES, as an index."""
    return (
        CLOTH.index(looks.upper.colour),
        CLOTH.index(looks.upper.second),
        PATTERNS.index(looks.upper.pattern),
        SLEEVES.index(looks.sleeve),
        PRINTS.index(looks.print),
        LOWERS.index(looks.lower_kind),
        LOWER.index(looks.lower.colour),
        PATTERNS.index(looks.lower.pattern),
        HAIR.index(looks.hair),
        HAIR_STYLES.index(looks.hair_style),
        SKIN.index(looks.skin),
        SHOES.index(looks.shoes),
        int(looks.boots),
        BAG_KINDS.index(looks.bag),
    )
