"""Retrieval scores against a plain restatement of the protocol, and its corner cases."""

import numpy as np
import pytest
import torch

from dpal.evaluate.reid import ReidLabels, match_ranks, retrieve


def labels_of(
    pids: list[int],
    cams: list[int] | None = None,
    query: list[bool] | None = None,
    gallery: list[bool] | None = None,
) -> ReidLabels:
    every = [True] * len(pids)
    return ReidLabels(
        np.array(pids),
        None if cams is None else np.array(cams),
        np.array(query or every),
        np.array(gallery or every),
    )


def restated(cls: torch.Tensor, labels: ReidLabels, other_camera_only: bool = False):
    """The protocol as loops over queries and gallery entries; returns (mAP, CMC, counts)."""
    vectors = cls.double().numpy()
    precisions, hits, skipped = [], [], 0
    for q in range(len(vectors)):
        if not labels.query[q]:
            continue
        ranked = []
        for g in range(len(vectors)):
            if not labels.gallery[g] or g == q:
                continue
            same_pid = labels.pids[g] == labels.pids[q]
            same_cam = labels.cams is not None and labels.cams[g] == labels.cams[q]
            if same_cam and (same_pid or other_camera_only):
                continue
            norms = np.linalg.norm(vectors[q]) * np.linalg.norm(vectors[g])
            cosine = round(float(vectors[q] @ vectors[g] / norms), 4)
            ranked.append((-cosine, bool(same_pid)))
        ranked.sort()  # False before True: a tie goes to the wrong person
        found, precision, first = 0, 0.0, None
        for rank, (_, same_pid) in enumerate(ranked, 1):
            if same_pid:
                found += 1
                precision += found / rank
                first = first or rank
        if first is None:
            skipped += 1
        else:
            precisions.append(precision / found)
            hits.append(first)
    cmc = tuple(100 * np.mean([hit <= k for hit in hits]) for k in (1, 5, 10))
    return 100 * np.mean(precisions), cmc, len(precisions), skipped


@pytest.mark.parametrize(
    ("num_cams", "other_camera_only"), [(None, False), (1, False), (3, False), (3, True)]
)
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_the_protocol_written_as_loops(seed, num_cams, other_camera_only):
    rng = np.random.default_rng(seed)
    n = 60
    pids = rng.integers(0, 12, n)
    # Axis-aligned vectors with signs: cosines are exactly -1, 0 or 1, so ties abound.
    axes = (
        np.eye(8)[rng.integers(0, 8, n)] * rng.choice([-1, 1], (n, 1)) * rng.uniform(1, 5, (n, 1))
    )
    cls = torch.from_numpy(axes).float()
    cams = None if num_cams is None else rng.integers(0, num_cams, n)
    labels = ReidLabels(pids, cams, rng.random(n) < 0.5, rng.random(n) < 0.9)
    if num_cams == 1:  # with one camera every true match is removed: nothing can be scored
        with pytest.raises(ValueError, match="no query"):
            retrieve(cls, labels)
        return
    mean_ap, cmc, num_queries, num_skipped = restated(cls, labels, other_camera_only)
    scores = retrieve(cls, labels, other_camera_only=other_camera_only)
    assert scores.mean_ap == pytest.approx(mean_ap, abs=1e-9)
    assert scores.cmc == pytest.approx(cmc, abs=1e-9)
    assert (scores.num_queries, scores.num_skipped) == (num_queries, num_skipped)


def test_dense_random_vectors_equal_the_loops_across_chunks(monkeypatch):
    monkeypatch.setattr("dpal.evaluate.reid.CHUNK", 7)
    rng = np.random.default_rng(5)
    pids = np.arange(80) % 20
    cls = torch.from_numpy(np.eye(20)[pids] + rng.normal(0, 0.4, (80, 20))).float()
    labels = labels_of(list(pids), list(rng.integers(0, 2, 80)))
    mean_ap, cmc, _, _ = restated(cls, labels)
    scores = retrieve(cls, labels)
    assert 20 < scores.mean_ap < 99  # neither trivial nor hopeless
    assert scores.mean_ap == pytest.approx(mean_ap, abs=0.05)  # the loops round cosines
    assert scores.cmc == pytest.approx(cmc, abs=0.05)


def test_known_ranking_gives_the_average_precision_by_hand():
    cls = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.4]])
    labels = labels_of([7, 3, 7, 3, 7], [0, 1, 1, 1, 1], [True] + [False] * 4)
    scores = retrieve(cls, labels)  # matches at ranks 2 and 4
    assert scores.mean_ap == pytest.approx(100 * (1 / 2 + 2 / 4) / 2)
    assert scores.cmc == (0.0, 100.0, 100.0)


def test_same_person_in_the_same_camera_is_no_match():
    cls = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.2]])
    labels = labels_of([1, 1, 1, 2], [0, 0, 1, 0], [True, False, False, False])
    assert retrieve(cls, labels).cmc[0] == 0.0  # the twin shot is removed, person 2 comes first
    assert retrieve(cls, labels, other_camera_only=True).cmc[0] == 100.0


def test_without_cameras_only_the_query_itself_is_removed():
    cls = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert retrieve(cls, labels_of([1, 1, 2, 2])).mean_ap == 100.0
    assert retrieve(cls, labels_of([1, 2, 1, 2])).cmc[0] == 0.0


def test_constant_features_score_lowest_whatever_the_order_of_files():
    pids = np.repeat(np.arange(5), 4)
    constant = torch.ones(20, 3)
    for order in (np.arange(20), np.random.default_rng(0).permutation(20)):
        scores = retrieve(constant, labels_of(list(pids[order])))
        # 16 others come first, then the 3 matches.
        expected = 100 * np.mean([1 / 17, 2 / 18, 3 / 19])
        assert scores.mean_ap == pytest.approx(expected)
        assert scores.cmc == (0.0, 0.0, 0.0)


def test_queries_without_a_match_are_counted_not_scored():
    cls = torch.eye(4) + 0.1
    scores = retrieve(cls, labels_of([1, 1, 2, 3]))
    assert (scores.num_queries, scores.num_skipped) == (2, 2)


def test_scale_of_features_does_not_matter():
    rng = np.random.default_rng(2)
    cls = torch.from_numpy(rng.normal(size=(30, 6))).float()
    scaled = cls * torch.from_numpy(rng.uniform(0.1, 50, (30, 1))).float()
    labels = labels_of(list(np.arange(30) % 6))
    assert retrieve(scaled, labels).mean_ap == pytest.approx(retrieve(cls, labels).mean_ap)


def test_ranks_of_ties_put_matches_last():
    similarity = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    match = np.array([False, True, False, True, True])
    assert match_ranks(similarity, match).tolist() == [3, 4, 5]


def test_cross_camera_protocol_without_cameras_is_refused():
    with pytest.raises(ValueError, match="cameras"):
        retrieve(torch.eye(4), labels_of([1, 1, 2, 2]), other_camera_only=True)
