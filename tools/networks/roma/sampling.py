"""The original's random sampling of matches, seeded: the reference that `selection` is compared with. Not exported."""

from __future__ import annotations

import torch

CERTAIN = 0.05
STD = 0.1  # of the density kernel, in normalised coordinates
SURPLUS = 4


def sample(warp: torch.Tensor, certainty: torch.Tensor, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Threshold-balanced sampling of warp [4, H, W] (x0, y0, x1, y1) and certainty [H, W].

    Four times `count` are drawn, all above the threshold alike; of these, `count` by the inverse of their density in
    the four coordinates. Matches with fewer than ten neighbours are all but excluded. Returns matches [count, 4] and
    their thresholded certainty [count].
    """
    generator = torch.Generator().manual_seed(seed)
    matches = warp.flatten(1).T
    weights = torch.where(certainty > CERTAIN, 1.0, certainty).flatten()
    drawn = _draw(weights, min(SURPLUS * count, int((weights > 0).sum())), generator)
    matches, weights = matches[drawn], weights[drawn]
    squares = (torch.cdist(part, matches) ** 2 for part in matches.split(1024))
    density = torch.cat([torch.exp(-square / (2 * STD**2)).sum(1) for square in squares])
    balance = torch.where(density < 10, 1e-7, 1.0 / (density + 1.0))
    chosen = _draw(balance, min(count, len(matches)), generator)
    return matches[chosen], weights[chosen]


def _draw(weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `count` different elements with these weights: the largest log(w) + Gumbel noise."""
    uniform = torch.rand(len(weights), dtype=torch.float64, generator=generator)
    return torch.topk(torch.log(weights.double()) - torch.log(-torch.log(uniform)), count).indices
