"""Two images through a sparse network that can be worked out by hand: its features are pixels of the image."""

from __future__ import annotations

import pytest
import torch

from matchanything_tools.networks.sparse_pair import SparsePair

Rows = list[tuple[float, float]]
FIRST: Rows = [(1.0, 0.0), (0.0, 1.0), (0.6, 0.8)]
SECOND: Rows = [(0.8, 0.6), (0.0, 1.0), (-1.0, 0.0)]  # cosines with FIRST: .8 0 -1, .6 1 0, .96 .8 -.6


def image(descriptors: Rows, scores: list[float], x: float) -> torch.Tensor:
    """Keypoint k is (x, k); [1, 3, 3, 2]."""
    keypoints = [(x, float(k)) for k in range(3)]
    return torch.tensor([keypoints, [(score, 0.0) for score in scores], descriptors])[None]


def features(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return images[:, 0], images[:, 1, :, 0], images[:, 2]


def found(scores0: list[float], scores1: list[float], criterion: str, one_batch: bool) -> dict[tuple[int, int], float]:
    """The matches by numbers of keypoints."""
    pair = SparsePair(features, criterion, 3, one_batch=one_batch)
    keypoints0, keypoints1, scores = pair(image(FIRST, scores0, 5.0), image(SECOND, scores1, 9.0))
    assert keypoints0[:, 0].tolist() == [5.0] * 3 and keypoints1[:, 0].tolist() == [9.0] * 3
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    rows = zip(keypoints0[:, 1].tolist(), keypoints1[:, 1].tolist(), scores.tolist(), strict=True)
    return {(int(a), int(b)): score for a, b, score in rows if score > 0}


@pytest.mark.parametrize("one_batch", [False, True])
def test_matches_are_those_of_valid_keypoints(one_batch: bool) -> None:
    """Mutual nearest neighbours with their cosines; a score of 0 marks padding in either image."""
    every, black = [0.5, 0.4, 0.3], [0.0, 0.0, 0.0]
    assert found(every, every, "mutual", one_batch) == pytest.approx({(1, 1): 1.0, (2, 0): 0.96})
    assert found([0.5, 0.4, 0.0], every, "mutual", one_batch) == pytest.approx({(1, 1): 1.0, (0, 0): 0.8})
    assert found(every, [0.0, 0.4, 0.3], "mutual", one_batch) == pytest.approx({(1, 1): 1.0})
    for criterion in ("dual_softmax", "mutual", "ratio"):
        assert found(every, black, criterion, one_batch) == found(black, every, criterion, one_batch) == {}


def test_criteria_differ() -> None:
    """ratio: the distance of (0.6, 0.8) to its best, .283, is .45 of that to the next; dual_softmax: a probability."""
    every = [0.5, 0.4, 0.3]
    assert found(every, every, "ratio", True) == pytest.approx({(1, 1): 1.0, (2, 0): 0.96})
    logits = 20 * torch.tensor(FIRST) @ torch.tensor(SECOND).T
    probability = torch.softmax(logits, 0) * torch.softmax(logits, 1)
    wanted = {(a, b): float(probability[a, b]) for a, b in ((1, 1), (2, 0))}
    assert found(every, every, "dual_softmax", True) == pytest.approx(wanted, rel=1e-5)
