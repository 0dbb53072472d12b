"""What a comparison of stored targets with a teacher's comes to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpal.parity import Bounds, Compared
from dpal.record import Kind


@dataclass(frozen=True)
class TeacherParity:
    """One teacher's cache beside the teacher.

    Attributes:
        cache: URL of the cache.
        samples, tokens: that were compared, in base views and composites together.
        median_cosine, smallest_cosine: of stored tokens with the teacher's after the same codec;
            the median is that of base views or of composites, whichever is smaller.
        largest_steps: largest difference of a patch number, in steps of the codec.
        largest_excess: largest difference as a share of what is accepted.
        worst: series and key of the record that differs most.
        codec_cosine: median cosine of stored patch tokens with the teacher's own: the codec's cost.
        losses: every loss term of the untrained student, from stored targets and from the teacher.
        accepted: the bounds.
        seconds: that it took, loading the teacher included.
    """

    cache: str
    samples: int
    tokens: int
    median_cosine: float
    smallest_cosine: float
    largest_steps: float
    largest_excess: float
    worst: str
    codec_cosine: float
    losses: Mapping[str, tuple[float, float]]
    accepted: Bounds
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether stored targets are what the teacher says."""
        return self.accepted.accept(self.median_cosine, self.smallest_cosine, self.largest_excess)

    @property
    def loss_errors(self) -> dict[str, float]:
        """Relative error of every loss term against the teacher's."""
        return {
            name: abs(stored - online) / max(abs(online), 1e-12)
            for name, (stored, online) in self.losses.items()
        }


def median_cosine(*kinds: Sequence[Compared]) -> float:
    """Median cosine of tokens of the kind of view that has the smaller one."""
    return min(
        float(np.median(np.concatenate([part.cosines.ravel() for part in parts])))
        for parts in kinds
        if parts
    )


class Figures:
    """What was compared so far, of one teacher."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.parts: list[Compared] = []
        self.kinds: list[Kind] = []

    def add(self, kind: Kind, names: Sequence[str], compared: Compared) -> None:
        """Take in a batch of views of one kind; `names` are those of its records."""
        self.names += names
        self.kinds.append(kind)
        self.parts.append(compared)

    def _of(self, kind: Kind) -> list[Compared]:
        return [part for own, part in zip(self.kinds, self.parts, strict=True) if own == kind]

    def summary(
        self,
        cache: str,
        samples: int,
        losses: Sequence[Sequence[Mapping[str, float]]],
        bounds: Bounds,
        seconds: float,
    ) -> TeacherParity:
        """What it comes to.

        Args:
            losses: of every batch, the loss terms with stored and with online targets.
        """
        smallest = np.concatenate([part.cosines.min(axis=1) for part in self.parts])
        excess = np.concatenate([part.excess for part in self.parts])
        # How far each record is beyond either bound; the first of equals.
        beyond = np.maximum(excess, (1 - smallest) / (1 - bounds.smallest))
        terms = losses[0][0]
        means = {
            name: (
                float(np.mean([pair[0][name] for pair in losses])),
                float(np.mean([pair[1][name] for pair in losses])),
            )
            for name in terms
        }
        return TeacherParity(
            cache=cache,
            samples=samples,
            tokens=sum(part.cosines.size for part in self.parts),
            median_cosine=median_cosine(self._of("view"), self._of("composite")),
            smallest_cosine=float(smallest.min()),
            largest_steps=float(max(part.steps.max() for part in self.parts)),
            largest_excess=float(excess.max()),
            worst=self.names[int(beyond.argmax())],
            codec_cosine=float(
                np.median(np.concatenate([part.codec_cosines.ravel() for part in self.parts]))
            ),
            losses=means,
            accepted=bounds,
            seconds=seconds,
        )
