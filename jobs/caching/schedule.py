"""Which actor caches which shard next: plain bookkeeping, without Ray, clocks or processes.

An actor has up to `DEPTH` shards: one with the teacher, one being fetched and rendered for it. What
a lost actor had goes back to the front. A shard that lost its actor once runs alone from then on,
so that another one is not blamed for it.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable

from dpal.base.errors import DataError

DEPTH = 2
RETRIES = 3  # of a shard whose actor was lost
SLOW, ENOUGH = 3.0, 3  # times the median of this many shards: then an idle actor does it, too
RECENT = 101  # shards that the median is of: a job of millions asks for it in every idle moment
LEAST_S = 10.0  # a shard faster than this is never done twice
LOOK_S = 1.0  # between two looks for a slow shard that found none


class Schedule:
    """Hands shards out and takes them back; every shard is finished once.

    Args:
        shards: names of what is to be done, in the order it is begun.
        clock: seconds, from any start.
    """

    def __init__(self, shards: Iterable[str], clock: Callable[[], float]) -> None:
        self._waiting = deque(shards)
        self._open = set(self._waiting)
        # {actor: {shard: since when}}, the oldest first: that one has the teacher.
        self._held: dict[Hashable, dict[str, float]] = {}
        self._lost: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._clock, self._looked = clock, -math.inf

    @property
    def left(self) -> int:
        """Shards that are not finished."""
        return len(self._open)

    def take(self, actor: Hashable) -> str | None:
        """The shard that `actor` may begin or prepare now; None when it has to wait."""
        held = self._held.setdefault(actor, {})
        if len(held) == DEPTH or any(self._lost[name] for name in held):
            return None
        while self._waiting and self._waiting[0] not in self._open:
            self._waiting.popleft()  # another actor was quicker
        # Near the end, what would only be prepared here can be begun by another actor.
        wanted = len(self._held) if held else 1
        if len(self._waiting) >= wanted:
            if held and self._lost[self._waiting[0]]:
                return None
            name = self._waiting.popleft()
        elif held or (straggler := self._straggler()) is None:
            return None
        else:
            name = straggler
        held[name] = self._clock()
        return name

    def finished(self, actor: Hashable, name: str) -> bool:
        """Note an answer; False when another actor had finished the shard before."""
        held, now = self._held[actor], self._clock()
        self._seconds.append(now - held.pop(name))
        for other in held:
            held[other] = now  # it has the teacher only now
        if name not in self._open:
            return False
        self._open.discard(name)
        return True

    def lose(self, actor: Hashable, why: str, *, blame: bool = True) -> None:
        """Take back what `actor` had.

        Args:
            why: clause behind the shard's name, if it was once too often.
            blame: whether a shard may be the reason; False for a machine that was taken away.

        Raises:
            DataError: naming a shard that lost more than `RETRIES` actors.
        """
        names = [name for name in self._held.pop(actor, {}) if name in self._open]
        for name in names:
            self._lost[name] += blame
            if self._lost[name] > RETRIES:
                raise DataError(f"shard {name!r} {why}")
        here = {name for held in self._held.values() for name in held}
        self._waiting.extendleft(name for name in reversed(names) if name not in here)

    def overdue(self, limit_s: float) -> list[Hashable]:
        """Actors whose teacher has had one shard for longer than `limit_s`."""
        now = self._clock()
        return [
            actor
            for actor, held in self._held.items()
            if held and now - next(iter(held.values())) > limit_s
        ]

    def _straggler(self) -> str | None:
        """The shard that one actor alone has had for much longer than usual."""
        if len(self._seconds) < ENOUGH or self._clock() - self._looked < LOOK_S:
            return None
        limit = max(LEAST_S, SLOW * statistics.median(self._seconds))
        copies = Counter(name for held in self._held.values() for name in held)
        now = self._clock()
        slow = [
            (since, name)
            for held in self._held.values()
            for name, since in held.items()
            if copies[name] == 1 and name in self._open and now - since > limit
        ]
        if slow:
            return min(slow)[1]
        self._looked = now
        return None
