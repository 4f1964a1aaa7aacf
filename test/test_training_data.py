"""What training shows: pictures that agree with their truth, couples, strangers, and no source that rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from matchanything_tools.networks.kestrel.model import cell_centres
from matchanything_tools.training import data
from matchanything_tools.training.data import NEGATIVE, REGISTERED, Photographs, load_photographs, make_batch
from matchanything_tools.training.geometry import between, cell_targets


@pytest.fixture
def plain_sensor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both views by the same sensor: the mean of red, green and blue."""
    monkeypatch.setattr(data, "sense", lambda rgb, difficulty, natural: rgb.mean(1, keepdim=True))
    yield


def look(views: Tensor, points: Tensor) -> Tensor:
    """Grey values [B, N] of views [B, 1, H, W] at points [B, N, 2] px."""
    size = torch.tensor([views.shape[3], views.shape[2]])
    grid = ((points + 0.5) / size * 2 - 1)[:, None]
    return F.grid_sample(views, grid, align_corners=False)[:, 0, 0]


@pytest.mark.usefixtures("plain_sensor")
def test_what_is_taught_to_match_looks_alike(photos: Photographs) -> None:
    """The pixels themselves, at the centre of every covisible cell and where it is said to lie in the other view."""
    torch.manual_seed(0)
    shape = (128, 160)
    batch = make_batch(replace(photos, couples=photos.couples[:0]), 24, shape, 0.2, 1.0)
    views0, views1 = batch.images.chunk(2)
    centres = cell_centres(16, 20).expand(24, -1, -1)
    for here, there, targets in ((views0, views1, batch.forward), (views1, views0, batch.backward)):
        assert targets.valid.float().mean() > 0.2
        value = look(here, centres)[targets.valid]
        places = {(x, y): look(there, targets.points + torch.tensor([x, y]))[targets.valid]
                  for x, y in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))}  # fmt: skip
        # Independent pictures: 0. Some is lost to zoom of up to 4 and to cells that the photograph's edge crosses.
        assert torch.corrcoef(torch.stack((value, places[0, 0])))[0, 1] > 0.95
        # A pixel beside it they agree less: the truth is right to half a pixel.
        differences = {shift: (value - other).abs().median().item() for shift, other in places.items()}
        assert min(differences, key=lambda shift: differences[shift]) == (0, 0), differences


@pytest.mark.usefixtures("plain_sensor")
def test_couples_are_shown_and_strangers_are_not_taught_as_matches() -> None:
    """Photographs of a single grey value each, which tells what a view shows; 1 and 2 are a couple."""
    torch.manual_seed(0)
    greys = torch.tensor([50, 100, 150, 200, 250])
    photos = Photographs(
        images=greys.to(torch.uint8).view(5, 1, 1, 1, 1).expand(-1, 2, 3, 8, 8),
        sizes=torch.tensor([[160.0, 120.0]]).expand(5, -1),
        couples=torch.tensor([[1, 2]]),
        weights=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]),  # by themselves 1 and 2 are never drawn
    )
    count = 600
    batch = make_batch(photos, count, (64, 64), 0.2, 1.0)
    first, second = ((batch.images.amax((1, 2, 3)) * 255 / 50).round().long() - 1).view(2, count)
    couple = (first == 1) & (second == 2)
    taught = batch.forward.valid.any(1) & batch.backward.valid.any(1)
    assert torch.equal(first != second, couple | batch.negative)
    assert not batch.forward.valid[batch.negative].any() and not batch.backward.valid[batch.negative].any()
    assert taught[couple].float().mean() > 0.9  # a few views overlap too little
    # Of those that are no couple, one in three draws the same photograph again. Four standard deviations of 600 draws.
    for found, share in ((couple, REGISTERED), (batch.negative, (1 - REGISTERED) * NEGATIVE * 2 / 3)):
        assert abs(found.float().mean() - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_large_sources_do_not_rule(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    entries = [{"file": f"{k}.png", "repo": "large" if k < 8 else "small"} for k in range(9)]
    entries[8]["registered_with"] = ["2.png", "elsewhere.png"]  # type: ignore[assignment]
    for k in range(9):
        cv2.imwrite(str(tmp_path / "train" / f"{k}.png"), np.zeros((4, 6, 3), np.uint8))
    (tmp_path / "train.json").write_text(json.dumps({"images": entries}), encoding="utf-8")
    photos = load_photographs(tmp_path, "cpu")
    weights = photos.weights
    assert weights[8] / weights[0] == pytest.approx(8**0.4)  # a photograph of the small source is drawn more often
    assert weights[:8].sum() / weights[8] == pytest.approx(8**0.6)  # the large source 3.5 times, not 8 times as often
    assert photos.couples.tolist() == [[8, 2]]
    assert photos.sizes.tolist() == [[6, 4]] * 9


@pytest.mark.parametrize("of_views", [False, True])
def test_what_lies_behind_is_not_covisible(of_views: bool) -> None:
    """About the middle of 64x64 px, (u, v) goes to (u, v) / 10 / (1 + u / 16): the horizon is the line u = -16.

    Cells beyond it, at u = -28 and -20, would land in the other view as well; H[2, 2], the corner's depth, is below 0
    and must stay so in the homography that is made from both views.
    """
    centre = torch.tensor([[1.0, 0.0, 31.5], [0.0, 1.0, 31.5], [0.0, 0.0, 1.0]])
    matrix = centre @ torch.tensor([[0.1, 0, 0], [0, 0.1, 0], [1 / 16, 0, 1]]) @ centre.inverse()
    assert matrix[2, 2] < 0
    homography = between(matrix[None], torch.eye(3)[None]) if of_views else matrix[None]
    everywhere = torch.ones(1, 64, dtype=torch.bool)
    targets = cell_targets(homography, everywhere, everywhere, (64, 64))
    assert ((targets.points > 0) & (targets.points < 63)).all()
    assert targets.valid.view(8, 8).tolist() == [[False] * 2 + [True] * 6] * 8


def test_cells_that_show_no_photograph_are_not_covisible() -> None:
    """All go one cell to the right. Cell 2 shows nothing, nor does cell 5 of the other view, which 4 goes to."""
    right = torch.tensor([[[1.0, 0.0, 8.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    inside, inside_other = torch.ones(2, 1, 8, dtype=torch.bool)
    inside[0, 2] = inside_other[0, 5] = False
    assert cell_targets(right, inside, inside_other, (8, 64)).valid[0].nonzero().flatten().tolist() == [0, 1, 3, 5, 6]
