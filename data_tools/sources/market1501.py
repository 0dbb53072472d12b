"""What the names of re-identification pictures say: identity, camera, sequence.

The conventions of Market-1501, DukeMTMC-reID, CUHK03-NP and MSMT17, all of which begin with the
identity. Detections that Market-1501 calls junk (identity -1) or distractors (0000: no person)
are left out; MSMT17's identity 0000 is a person.
"""

import re
from typing import NamedTuple

_NAMES = (
    re.compile(r"(?P<identity>-1|\d{4,})_c(?P<camera>\d+)s(?P<sequence>\d+)_\d+_\d+"),  # Market
    re.compile(r"(?P<identity>\d{4,})_c(?P<camera>\d+)_f?\d+"),  # DukeMTMC, CUHK03-NP
    re.compile(r"(?P<identity>\d{4,})_\d{3}_(?P<camera>\d{2})_\d{4}[a-z]+_\d+_\d+"),  # MSMT17
)
ACCEPTED = "0002_c1s1_000451_03.jpg, 0001_c2_f0046182.jpg, 0000_000_01_0303morning_0015_0.jpg"


class Named(NamedTuple):
    """What a name says; `left_out` says why the picture is not used, where it is not."""

    facts: dict[str, str]
    left_out: str = ""


def read_name(name: str) -> Named | None:
    """What the picture's name says; None for names of no known form."""
    stem = name.rpartition("/")[2].partition(".")[0]
    found = next((match for form in _NAMES if (match := form.match(stem))), None)
    if found is None:
        return None
    facts = found.groupdict()
    if facts["identity"] == "-1":
        return Named(facts, "junk")
    if "sequence" in facts and not int(facts["identity"]):
        return Named(facts, "distractor")
    return Named(facts)
