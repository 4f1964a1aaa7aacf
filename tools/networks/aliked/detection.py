"""Differentiable keypoint detection (DKD) of ALIKED: score map -> K keypoints with sub-pixel positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matchanything_tools.networks.maxima import largest
from matchanything_tools.networks.sampling import pixel_grid, sample
from matchanything_tools.networks.topk import topk

RADIUS = 2  # of the suppression and of the sub-pixel window
TEMPERATURE = 0.1  # of the softmax over the sub-pixel window


def suppress(scores: Tensor) -> Tensor:
    """Keep local maxima (5x5, two more rounds among what they leave over), set the rest and a 2 px border to 0.

    scores [B, 1, H, W] in (0, 1) -> same shape.
    """
    keep = scores == _max5(scores)
    for _ in range(2):
        near = _max5(keep.to(scores.dtype)) > 0
        rest = torch.where(near, torch.zeros_like(scores), scores)
        keep = keep | ((rest == _max5(rest)) & ~near)
    inner = torch.ones_like(scores[:1, :, RADIUS:-RADIUS, RADIUS:-RADIUS])
    return torch.where(keep, scores, torch.zeros_like(scores)) * F.pad(inner, [RADIUS] * 4)


def select(maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the suppressed map [B, 1, H, W]: scores [B, k], best first, 0 where there are fewer, and their
    pixels (x, y) [B, k, 2] int64.

    Two maxima are at least 3 px apart (equal neighbours excepted, of which one is taken), so each 3x3 block holds at
    most one and the search is over a ninth of the pixels.
    """
    height, width = maxima.shape[2:]
    rows, columns = (height + 2) // 3, (width + 2) // 3
    padded = F.pad(maxima, (0, 2, 0, 2)).narrow(2, 0, rows * 3).narrow(3, 0, columns * 3)
    blocks = padded.reshape(-1, rows, 3, columns, 3).transpose(2, 3).reshape(-1, rows * columns, 9)
    highest = F.max_pool2d(padded, 3, stride=3).reshape(-1, rows * columns)
    scores, block = topk(F.pad(highest, (0, k)), k)  # padding: a small image has fewer than k blocks
    block = block.clamp(max=rows * columns - 1)
    nine = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, 9))
    places = torch.arange(9, device=maxima.device, dtype=torch.float32)
    place = largest(torch.where(nine == scores.unsqueeze(2), places, torch.zeros_like(places)), -1)[..., 0]
    place = place.to(torch.int64)
    across = torch.full_like(block, columns)  # a tensor: the exporter knows no remainder by a dynamic number
    x = (block % across) * 3 + place % 3
    y = (block // across) * 3 + place // 3
    return scores, torch.stack((x, y), dim=2)


def refine(scores: Tensor, pixels: Tensor) -> Tensor:
    """Sub-pixel positions [B, K, 2] float32 by a softmax over the 5x5 window of the score map around `pixels` (int)."""
    height, width = scores.shape[2:]
    window = pixel_grid(5, 5, scores.device).reshape(25, 2) - RADIUS
    limit = torch.stack([torch.full((), size - 1, dtype=torch.int64) for size in (width, height)])
    around = pixels.unsqueeze(2) + window.to(torch.int64)
    around = torch.minimum(around.clamp(min=0), limit)  # only padding reaches over the edge: maxima keep 2 px from it
    index = around[..., 1] * width + around[..., 0]
    values = scores.reshape(scores.shape[0], -1).gather(1, index.flatten(1)).reshape(index.shape)
    weights = torch.softmax(values / TEMPERATURE, dim=2)
    return pixels.float() + (weights.unsqueeze(3) * window).sum(dim=2)


def detect(scores: Tensor, k: int, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Keypoints of a score map [B, 1, H, W].

    Args:
        k: how many at most.
        threshold: None takes the k best; otherwise only those above it (above the mean score, as the original does,
            if no pixel is).

    Returns:
        keypoints [B, k, 2] pixels (x, y), and their scores [B, k]: order by the score of the maximum's pixel, value
        sampled at the refined position; 0 marks padding.
    """
    peak, pixels = select(suppress(scores), k)
    valid = peak > 0
    if threshold is not None:
        mean = scores.mean(dim=(1, 2, 3)).unsqueeze(1)
        any_above = peak[:, :1] > threshold
        valid = valid & (peak > torch.where(any_above, torch.full_like(mean, threshold), mean))
    keypoints = refine(scores, pixels)
    value = sample(scores, keypoints.unsqueeze(1))[:, 0, 0]
    return keypoints, torch.where(valid, value, torch.zeros_like(value))


def _max5(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2 * RADIUS + 1, stride=1, padding=RADIUS)
