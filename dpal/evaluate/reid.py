"""Person re-identification: retrieval by cosine distance of global vectors, no re-ranking.

The protocol is that of Market-1501 (Zheng et al., ICCV 2015): a query is ranked against the
gallery without the entries that show the same person in the same camera. AP is the mean of the
precision at every true match. A tie is broken against the model, so the order of the files never
matters and a model that says the same of every image scores lowest.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn import functional

RANKS = (1, 5, 10)
CHUNK = 512  # queries in one similarity block: 512 x 100,000 gallery images are 200 MB


@dataclass(frozen=True)
class ReidLabels:
    """Who is seen where in n images.

    Attributes:
        pids: identity of each image [n].
        cams: camera of each image [n], or None when the set has no cameras.
        query: images that are searched for [n], bool.
        gallery: images that are searched in [n], bool; an image may be both.
    """

    pids: np.ndarray
    cams: np.ndarray | None
    query: np.ndarray
    gallery: np.ndarray


class ReidScores(NamedTuple):
    """Retrieval scores, in percent of the queries that have a valid match.

    Attributes:
        mean_ap: mean average precision.
        cmc: share of queries with a true match among the first k, for each k of `RANKS`.
        num_queries: queries that count.
        num_skipped: queries without any valid match in the gallery.
    """

    mean_ap: float
    cmc: tuple[float, ...]
    num_queries: int
    num_skipped: int

    def metrics(self) -> dict[str, float]:
        """The scores by name, in percent."""
        ranks = {f"rank-{k}": value for k, value in zip(RANKS, self.cmc, strict=True)}
        return {"mAP": self.mean_ap, **ranks}


def retrieve(cls: Tensor, labels: ReidLabels, *, other_camera_only: bool = False) -> ReidScores:
    """Score global vectors [n, D] by retrieval.

    Args:
        other_camera_only: also leave other persons of the query's own camera out of the gallery
            (the cross-view protocol of CUHK03); needs `labels.cams`.

    Raises:
        ValueError: no query has a valid match.
    """
    unit = functional.normalize(cls.float(), dim=1)  # [n, D]
    queries, gallery = np.flatnonzero(labels.query), np.flatnonzero(labels.gallery)
    precisions, first_hits = [], []
    for start in range(0, len(queries), CHUNK):
        chunk = queries[start : start + CHUNK]
        similarity = (unit[chunk] @ unit[gallery].T).numpy()  # [q, g]
        for row, query in zip(similarity, chunk, strict=True):
            kept = _valid(labels, query, gallery, other_camera_only)
            match = labels.pids[gallery[kept]] == labels.pids[query]
            if match.any():
                ranks = match_ranks(row[kept], match)
                precisions.append(float(np.mean(np.arange(1, len(ranks) + 1) / ranks)))
                first_hits.append(int(ranks[0]))
    if not precisions:
        raise ValueError("no query has a valid match in the gallery")
    first = np.array(first_hits)
    return ReidScores(
        mean_ap=100 * float(np.mean(precisions)),
        cmc=tuple(100 * float(np.mean(first <= k)) for k in RANKS),
        num_queries=len(precisions),
        num_skipped=len(queries) - len(precisions),
    )


def match_ranks(similarity: np.ndarray, match: np.ndarray) -> np.ndarray:
    """1-based ranks of the true matches, ascending; in a tie every other entry comes first."""
    hits, others = -np.sort(-similarity[match]), similarity[~match]
    ahead: np.ndarray = np.array([np.count_nonzero(others >= hit) for hit in hits])
    return ahead + np.arange(1, len(hits) + 1)


def _valid(
    labels: ReidLabels, query: int, gallery: np.ndarray, other_camera_only: bool
) -> np.ndarray:
    """Which gallery entries count for `query`: bool [g]."""
    kept: np.ndarray = gallery != query
    if labels.cams is None:
        if other_camera_only:
            raise ValueError("other_camera_only needs cameras")
        return kept
    same_camera = labels.cams[gallery] == labels.cams[query]
    if other_camera_only:
        return kept & ~same_camera
    return kept & ~(same_camera & (labels.pids[gallery] == labels.pids[query]))
