"""What training minimises and reports, against values by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from matchanything_tools.networks.kestrel.model import Features, cell_centres
from matchanything_tools.networks.kestrel.refine import PatchRefiner, WindowRefiner
from matchanything_tools.training.data import Batch
from matchanything_tools.training.geometry import Targets
from matchanything_tools.training.losses import (
    FOCUS,
    FineSample,
    cell_loss,
    fine_losses,
    match_quality,
    matchable_loss,
)


def targets(cells: list[list[int]], valid: list[list[int]], points: Tensor | None = None) -> Targets:
    index = torch.tensor(cells)
    return Targets(torch.zeros(*index.shape, 2) if points is None else points, index, torch.tensor(valid).bool())


def batch(forward: Targets, backward: Targets, inside: list[list[list[int]]], negative: list[int]) -> Batch:
    empty = torch.zeros(0)
    return Batch(empty, empty, forward, backward, torch.tensor(inside).bool(), torch.tensor(negative).bool())


def test_the_cell_loss_is_the_focal_loss_of_rows_and_of_columns() -> None:
    """Two cells against three, with logits that make fractions of the probabilities."""
    logits = torch.tensor([[[1.0, 2.0, 1.0], [3.0, 1.0, 4.0]]]).log()
    forward = targets([[1, 0]], [[1, 1]])  # 2 of 4 and 3 of 8 along the rows
    backward = targets([[1, 0, 1]], [[1, 1, 0]])  # 3 of 4 and 2 of 3 along the columns; the third has no partner

    def focal(p: float) -> float:
        return -((1 - p) ** FOCUS) * math.log(p)

    expected = (focal(2 / 4) + focal(3 / 8)) / 2 + (focal(3 / 4) + focal(2 / 3)) / 2
    assert cell_loss(logits, forward, backward).item() == pytest.approx(expected, rel=1e-5)


def test_matchability_is_taught_view_by_view() -> None:
    """The first cell of view 0 has a partner, the others have none; the last one shows nothing and does not count."""
    case = batch(targets([[0, 0]], [[1, 0]]), targets([[0, 0]], [[0, 0]]), [[[1, 1]], [[1, 0]]], [0])
    right = math.log(3)  # three to one
    logits = torch.tensor([[[right, -right]], [[-right, right]]])
    assert matchable_loss(logits, case).item() == pytest.approx(-3 * math.log(3 / 4) / 4, rel=1e-5)


@dataclass
class Says:
    """In place of a fine stage: answers, whatever it is asked, and the real one's grid."""

    grid: Tensor
    offset: Tensor
    log_scale: Tensor
    logits: Tensor

    def __call__(self, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        return self.offset, self.log_scale, self.logits


GRIDS = (WindowRefiner(4, 8).grid, PatchRefiner(4).grid)  # 10x10 keys, 2 px apart; 7x7 samples, a step apart


def losses_of(truths: tuple[Tensor, Tensor], said: list[Says]) -> tuple[Tensor, ...]:
    """(window_ce, window_nll, patch_ce, patch_nll) of one pair; truths [M, 2] of both stages."""
    count = len(truths[0])
    cells, points = torch.zeros(1, count, dtype=torch.long), torch.zeros(1, count, 2)
    maps = Features(*(torch.zeros(2, 4, 4, 4) for _ in Features._fields))
    valid, affine = torch.ones(1, count, dtype=torch.bool), torch.eye(2).expand(1, count, 2, 2)
    sample = FineSample(cells, cells, truths[0][None], points, points, affine, truths[1][None], valid)
    return fine_losses(*said, maps, sample)[:4]  # type: ignore[arg-type]


def test_places_are_taught_as_bilinear_weights_of_the_grid() -> None:
    """One truth on a point of the grid, which alone counts, one half-way to the next; 3/4 are said for that point."""
    point = 24  # not in the last column of either grid
    said, truths, expected = [], [], []
    for grid in GRIDS:
        others = len(grid) - 1
        logits = torch.zeros(2, len(grid))
        logits[:, point] = math.log(3 * others)
        said.append(Says(grid, torch.zeros(2, 2), torch.zeros(2), logits))
        truths.append(torch.stack((grid[point], grid[point : point + 2].mean(0))))
        once, half = -math.log(3 / 4), -(math.log(3 / 4) + math.log(1 / 4 / others)) / 2
        expected.append((once + half) / 2)
    for stage in said[1:]:  # the patch stage answers pair by pair
        stage.offset, stage.log_scale, stage.logits = (x[None] for x in (stage.offset, stage.log_scale, stage.logits))
    window_ce, _, patch_ce, _ = losses_of((truths[0], truths[1]), said)
    assert [window_ce.item(), patch_ce.item()] == pytest.approx(expected, rel=1e-5)


def test_the_best_scale_to_state_is_half_the_error() -> None:
    """Laplace in x and in y: |error| / scale + 2 log(scale) is least where the scale is half of it."""
    errors, log_scales = torch.tensor([[1.0, -2.0], [0.5, 0.1]]), torch.tensor([math.log(1.5), math.log(0.3)])
    scales = [log_scales.clone().requires_grad_(), log_scales[None].clone().requires_grad_()]
    truths = tuple(torch.full((2, 2), 0.25) for _ in GRIDS)
    said = [
        Says(GRIDS[0], errors + truths[0], scales[0], torch.zeros(2, 100)),
        Says(GRIDS[1], (errors + truths[1])[None], scales[1], torch.zeros(1, 2, 49)),
    ]
    _, window_nll, _, patch_nll = losses_of((truths[0], truths[1]), said)
    for loss, scale in ((window_nll, scales[0]), (patch_nll, scales[1])):
        assert loss.item() == pytest.approx(2 + math.log(1.5) + math.log(0.3), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, scale)
        assert gradient.abs().max() < 1e-6


def test_reported_matches_are_mutual_and_sure() -> None:
    """Two pairs of 1x5 cells, cell k at home in cell k; `shares` are what the softmax makes probabilities of.

    Pair 0: cell 0 finds its partner; so does cell 1 in its neighbour 0, which prefers cell 0; cell 2 is right but says
    that it has no partner; cell 3 is sure of cell 1, two cells off; cell 4, which has no partner, is sure of cell 3.
    Pair 1, strangers: all are sure of each other, but the second view calls three of its cells without partner.
    """
    shares = torch.full((2, 5, 5), 1e-6)
    for row, column, share in ((0, 0, 8), (1, 0, 4), (2, 2, 8), (3, 1, 8), (4, 3, 8)):
        shares[0, row, column] = share
    shares[1] += 8 * torch.eye(5)
    chance = torch.full((2, 2, 1, 5), 0.99)  # view, pair, cells
    chance[0, 0, 0, 2], chance[1, 1, 0, :3] = 0.05, 0.05
    home, valid, centres = [list(range(5))] * 2, [[1, 1, 1, 1, 0], [0] * 5], cell_centres(1, 5)
    forward = targets(home, valid, centres.expand(2, -1, -1))
    case = batch(forward, targets(home, valid), [[[1] * 5] * 2] * 2, [0, 1])
    quality = match_quality(shares.log(), chance.flatten(0, 1).logit(), case, centres)
    # kept: cells 0, 3 and 4, of which 0 is right; cells 0 to 3 could be found
    found = {name: value.item() for name, value in quality.items()}
    assert found == pytest.approx({"precision": 1 / 3, "recall": 1 / 4, "strangers": 2.0})
