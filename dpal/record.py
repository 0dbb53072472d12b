"""The bytes of one record of a target cache, and the view spec it begins with.

    view spec (uint16 numbers) | CLS | fp16 scales (int8, int4) | patch codes | crc32

All numbers are little-endian; all records of a kind have the same length. What a codec word means
is in `dpal.base.codec`, what scales and codes are in `dpal.quantise`.

Legend: B records, S spec numbers, R record bytes.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpal.base.codec import Storage, parse_codec
from dpal.base.errors import DataError
from dpal.quantise import code_bytes, num_groups
from dpal.views.specs import Box, CompositeSpec, SceneSpec, ViewSpec

Kind = Literal["view", "composite"]
Spec = ViewSpec | CompositeSpec | SceneSpec
SPEC_NUMBERS: Mapping[Kind, int] = {"view": 6, "composite": 22}
# The first number of a record says what the others mean.
VIEW, SAME_IMAGE, TWO_IMAGES, SCENE = 1, 2, 3, 4


@dataclass(frozen=True)
class RecordLayout:
    """Where the parts of a record lie, in bytes.

    Attributes:
        codec: a word that `dpal.base.codec.parse_codec` accepts.
        width: channels of a teacher token; CLS is stored with all of them.
    """

    kind: Kind
    codec: str
    width: int
    num_patches: int

    @property
    def storage(self) -> Storage:
        """Type of a stored number of a patch token."""
        return parse_codec(self.codec).storage

    @property
    def channels(self) -> int:
        """Numbers that are stored of a patch token."""
        return parse_codec(self.codec).channels(self.width)

    @property
    def num_groups(self) -> int:
        """Scales of a patch token."""
        return num_groups(self.storage, self.channels)

    @property
    def cls_start(self) -> int:
        """End of the view spec."""
        return 2 * SPEC_NUMBERS[self.kind]

    @property
    def scale_start(self) -> int:
        """End of the CLS token: fp32 with the fp32 codec, else fp16."""
        return self.cls_start + self.width * (4 if self.storage == "fp32" else 2)

    @property
    def code_start(self) -> int:
        """End of the fp16 scales, patch by patch."""
        return self.scale_start + 2 * self.num_patches * self.num_groups

    @property
    def crc_start(self) -> int:
        """End of the patch codes."""
        return self.code_start + self.num_patches * code_bytes(self.storage, self.channels)

    @property
    def num_bytes(self) -> int:
        """Length of a record; states the crc32 of everything before it, little-endian."""
        return self.crc_start + 4


def spec_numbers(spec: Spec) -> np.ndarray:
    """The explicit numbers of a spec as uint16 [S]. Raises DataError when one does not fit."""
    if isinstance(spec, CompositeSpec):
        views = (spec.background_view, *spec.persons)
        boxes = [n for view in views for n in (*view.box, int(view.flip))]
        tag = SAME_IMAGE if spec.partner is None else TWO_IMAGES
        corners = (n for corner in spec.corners for n in corner)
        numbers = [tag, spec.background, *boxes, *corners, spec.partner or 0]
    elif isinstance(spec, SceneSpec):
        numbers = [SCENE, spec.scene, *spec.view.box, int(spec.view.flip)]
        numbers += [0] * (SPEC_NUMBERS["composite"] - len(numbers))
    else:
        numbers = [VIEW, *spec.box, int(spec.flip)]
    if not all(0 <= number < 1 << 16 for number in numbers):
        raise DataError(
            f"view {spec} does not fit into a record: accepted are sides and rows up to 65535"
        )
    return np.array(numbers, dtype=np.uint16)


def spec_of(numbers: np.ndarray) -> Spec:
    """The spec that `spec_numbers` wrote down."""
    plain = [int(number) for number in numbers]
    if plain[0] == VIEW:
        return ViewSpec(Box(*plain[1:5]), bool(plain[5]))
    if plain[0] == SCENE:
        return SceneSpec(plain[1], ViewSpec(Box(*plain[2:6]), bool(plain[6])))
    starts = (2, 7, 12)
    behind, first, second = (ViewSpec(Box(*plain[i : i + 4]), bool(plain[i + 4])) for i in starts)
    corners = ((plain[17], plain[18]), (plain[19], plain[20]))
    partner = plain[21] if plain[0] == TWO_IMAGES else None
    return CompositeSpec(plain[1], behind, (first, second), corners, partner)


def stored_spec(record: np.ndarray, kind: Kind) -> Spec:
    """The spec at the beginning of one record uint8 [R]."""
    return spec_of(np.ascontiguousarray(record[: 2 * SPEC_NUMBERS[kind]]).view("<u2"))


def damaged_rows(records: np.ndarray, layout: RecordLayout) -> list[int]:
    """Rows of uint8 [B, R] whose crc32 does not match their content."""
    stored = np.ascontiguousarray(records[:, layout.crc_start :]).view("<u4")[:, 0]
    return [
        i for i, row in enumerate(records) if zlib.crc32(row.data[: layout.crc_start]) != stored[i]
    ]
