"""How targets are stored: one word, `[pca<r>-|phis-](int8|int4|fp16)` or `fp32`.

The part before the dash turns a patch token before it is stored: `pca<r>` keeps its r strongest
principal components, `phis` turns all of it by PHI-S. The last part is what a number becomes.

Legend: D teacher width, r components that are kept.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator

from dpal.base.errors import ConfigError

Storage = Literal["int8", "int4", "fp16", "fp32"]
Turn = Literal["none", "pca", "phis"]

ACCEPTED = (
    "int8, int4, fp16 or fp32, and before each but fp32 a rotation pca<r>- or phis-, as in "
    "pca256-int8 or phis-int4; r is even and at least 4"
)
MIN_RANK = 4
_WORD = re.compile(
    r"(?:(?:pca(?P<rank>[1-9][0-9]{0,5})|(?P<phis>phis))-)?(?P<storage>int8|int4|fp16)"
)


@dataclass(frozen=True)
class Codec:
    """What a codec word says.

    Attributes:
        word: as in the recipe and in the header of a cache.
        turn: what is done to a patch token before it is stored.
        rank: components that `pca` keeps; 0 with the other turns.
        storage: type of a stored number.
    """

    word: str
    turn: Turn
    rank: int
    storage: Storage

    def channels(self, width: int) -> int:
        """Numbers that are stored of a token of D = `width` channels."""
        return self.rank or width

    def require_width(self, width: int) -> None:
        """Raise ConfigError when the word does not fit a teacher of `width` channels."""
        if self.rank >= width:
            raise ConfigError(
                f"cache.codec={self.word}: the teacher's tokens have {width} channels; accepted "
                f"are pca4 to pca{(width - 1) // 2 * 2}"
            )


@lru_cache(maxsize=64)
def parse_codec(word: str) -> Codec:
    """Read a codec word. Raises ValueError, in one sentence, for another word."""
    if word == "fp32":
        return Codec(word, "none", 0, "fp32")
    match = _WORD.fullmatch(word)
    if match is None:
        raise ValueError(f"cache.codec={word!r}: accepted are {ACCEPTED}")
    rank, storage = int(match["rank"] or 0), match["storage"]
    if match["rank"] and (rank % 2 or rank < MIN_RANK):
        raise ValueError(f"cache.codec={word!r} keeps {rank} components: accepted are {ACCEPTED}")
    turn: Turn = "pca" if rank else "phis" if match["phis"] else "none"
    storages: dict[str, Storage] = {"int8": "int8", "int4": "int4", "fp16": "fp16"}
    return Codec(word, turn, rank, storages[storage])


def _checked(word: str) -> str:
    return parse_codec(word).word


CodecWord = Annotated[str, AfterValidator(_checked)]
