"""What every stage of `dpal run` returns."""

from typing import NamedTuple


class StageResult(NamedTuple):
    """Outcome of one stage.

    Attributes:
        name: the verb ("shard", "cache", ...).
        skipped: True when everything was done before and nothing was computed.
        detail: one line for the console, with numbers.
    """

    name: str
    skipped: bool
    detail: str
