"""The K matches of a dense warp: exact, the same each time, spread as the original's random ones are."""

from __future__ import annotations

import pytest
import torch

from matchanything_tools.networks.roma.grids import pixel_grid
from matchanything_tools.networks.roma.network import symmetric_warp
from matchanything_tools.networks.roma.sampling import sample
from matchanything_tools.networks.roma.selection import candidates, select

SIDE = 96


def dense(height: int = SIDE, width: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth flow in both directions and certainty in (0, 1), all different."""
    generator = torch.Generator().manual_seed(4)
    flow = 0.8 * pixel_grid(height, width).repeat(2, 1, 1, 1) + 0.01 * torch.rand(
        2, 2, height, width, generator=generator
    )
    return flow, 0.06 + 0.9 * torch.rand(2, 1, height, width, generator=generator)


def rows(*parts: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in torch.cat(parts, -1).round(decimals=2).tolist()}


@pytest.mark.parametrize(("height", "width"), [(96, 96), (98, 70)])
def test_matches_lie_on_the_warp(height: int, width: int) -> None:
    flow, certainty = dense(height, width)
    count = candidates(height, width) // 2
    keypoints0, keypoints1, scores = select(flow, certainty, count, (height, width))
    warp, cert = symmetric_warp(flow, certainty)
    size = torch.tensor([width, height, width, height])
    pixels = size / 2 * (warp[0].flatten(1).T + 1) - 0.5
    assert rows(keypoints0, keypoints1, scores[:, None]) <= rows(pixels, cert.flatten()[:, None])
    assert len(rows(keypoints0, keypoints1)) == count  # none twice
    assert bool((scores[1:] <= scores[:-1]).all())
    again = select(flow, certainty, count, (height, width))
    assert torch.equal(again[0], keypoints0) and torch.equal(again[1], keypoints1)


def test_every_neighbourhood_gives_its_best_before_any_gives_two() -> None:
    flow, certainty = dense()
    certainty[0, 0, :16, :16] = 0.99 + 0.001 * torch.rand(16, 16)  # one cell outshines all others
    cells = (SIDE // 16) ** 2
    keypoints0, keypoints1, _ = select(flow, certainty, 2 * cells, (SIDE, SIDE))
    # Integers within rounding: a pixel of image 0 is the source of its match (direction 0), or of image 1.
    forward = ((keypoints0 - keypoints0.round()).abs() < 1e-3).all(1)
    source = torch.where(forward[:, None], keypoints0, keypoints1).round().long() // 16
    taken = {(bool(f), *s) for f, s in zip(forward.tolist(), source.tolist(), strict=True)}
    assert len(taken) == 2 * cells


def test_the_best_of_every_cell_comes_first() -> None:
    flow, certainty = dense()
    cells = SIDE // 16
    best = certainty.reshape(2, cells, 16, cells, 16).amax((2, 4)).flatten()
    _, _, scores = select(flow, certainty, len(best), (SIDE, SIDE))
    assert torch.equal(scores, best.sort(descending=True)[0])


def test_targets_outside_end_at_the_border() -> None:
    """A flow to 1.3 or -1.3 of a map of 32 x 48: the outer edges of the last pixels."""
    flow = torch.tensor([1.3, -1.3]).reshape(1, 2, 1, 1).expand(2, 2, 32, 48)
    _, certainty = dense(32, 48)
    keypoints0, keypoints1, _ = select(flow, certainty, candidates(32, 48), (32, 48))
    corner = torch.tensor([47.5, -0.5])
    ends0, ends1 = ((keypoints == corner).all(1) for keypoints in (keypoints0, keypoints1))
    assert bool((ends0 ^ ends1).all()) and int(ends0.sum()) == int(ends1.sum()) == candidates(32, 48) // 2


def test_a_small_overlap_is_filled() -> None:
    flow, certainty = dense()
    certainty *= 0.0
    certainty[:, :, 16:48, 16:48] = 0.9
    _, _, scores = select(flow, certainty, 400, (SIDE, SIDE))
    # 2 directions x (32/4)^2 fine cells hold a certain pixel; the rest is padding, marked by 0.
    assert int((scores > 0).sum()) == 2 * 64
    assert not scores[128:].any()


def test_more_than_one_topk_can_take() -> None:
    """TensorRT takes 3840 at once: 5000 need two passes, with the same result as one sort."""
    side = 224
    flow, certainty = dense(side, side)
    _, _, scores = select(flow, certainty, 5000, (side, side))
    best = certainty[:, 0].reshape(2, side // 4, 4, side // 4, 4).amax((2, 4)).flatten()
    assert len(scores) == 5000 and bool((scores[1:] <= scores[:-1]).all())
    assert set(scores.tolist()) <= set(best.tolist())


def test_spread_is_that_of_the_original_sampling() -> None:
    """Share of matches in each ninth of image 0, for a certain region of two thirds: as the seeded original draws."""
    flow, certainty = dense()
    certainty[:, :, 64:] = 0.001
    warp, cert = symmetric_warp(flow, certainty)
    drawn, weights = sample(warp[0], cert[0, 0], 600)
    ours, _, _ = select(flow, certainty, 600, (SIDE, SIDE))
    drawn = SIDE / 2 * (drawn[:, :2] + 1) - 0.5

    def share(points: torch.Tensor) -> torch.Tensor:
        ninth = (points.clamp(0, SIDE - 1) // 32).long()
        return torch.bincount(ninth[:, 1] * 3 + ninth[:, 0], minlength=9) / len(points)

    # 600 random draws scatter by 1.5 % in a ninth that holds a sixth of them: three times that.
    assert float((share(drawn) - share(ours)).abs().max()) < 0.05
    assert set(weights.unique().tolist()) == {1.0}  # thresholded, as the original returns it
    assert torch.equal(sample(warp[0], cert[0, 0], 50)[0], sample(warp[0], cert[0, 0], 50)[0])
