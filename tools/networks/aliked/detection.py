"""Differentiable keypoint detection (DKD) of ALIKED: score map -> K keypoints with sub-pixel positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matchanything_tools.networks.sampling import pixel_grid, sample
from matchanything_tools.networks.topk import PASS_LIMIT, quotient, topk

RADIUS = 2  # of the suppression and of the sub-pixel window
TEMPERATURE = 0.1  # of the softmax over the sub-pixel window
LEAST = torch.finfo(torch.float16).min


def suppress(scores: Tensor) -> Tensor:
    """Keep local maxima (5x5, two more rounds among what they leave over), set the rest and a 2 px border to 0.

    scores [B, 1, H, W] in (0, 1) -> same shape.
    """
    nothing = torch.zeros_like(scores)
    kept = torch.where(scores == _max5(scores), scores, nothing)
    for _ in range(2):
        rest = torch.where(_max5(kept) > 0, nothing, scores)
        kept = kept + torch.where(rest == _max5(rest), rest, nothing)
    inner = torch.ones_like(scores[..., RADIUS:-RADIUS, RADIUS:-RADIUS])  # of every image: a plain product is cheaper
    return kept * F.pad(inner, [RADIUS] * 4)


def select(maxima: Tensor, k: int, *, ordered: bool = True, ranks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k best of the suppressed map [B, 1, H, W]: scores [B, k], best first if `ordered`, 0 where there are fewer,
    and their pixels y W + x [B, k] int64, at least 2 px inside, padding too.

    Two maxima are at least 3 px apart (equal neighbours excepted, of which one is taken), so each 3x3 block holds at
    most one and the search is over a ninth of the pixels. The place of a block's maximum is found by pooling, too: that
    of the map's pixel numbers, which float32 holds exactly up to 4096x4096.

    ranks: [B, 1, H, W] of which the scores are a rising function: chosen by and returned instead, LEAST where there are
    fewer. Of the scores' logits in fp16, a GPU finds the largest in two thirds of the time.
    """
    height, width = maxima.shape[2:]
    row, column = (torch.arange(n, dtype=torch.float32, device=maxima.device) for n in (height, width))
    numbers = row.unsqueeze(1) * width + column
    first = torch.full((), RADIUS * width + RADIUS, dtype=torch.float32, device=maxima.device)  # what padding gets
    places = torch.where(maxima > 0, numbers, first)
    if ranks is not None:
        maxima = torch.where(maxima > 0, ranks, torch.full_like(ranks, LEAST))
    highest, places = (_rows(F.max_pool2d(x, 3, stride=3, ceil_mode=True)) for x in (maxima, places))
    blocks = highest.shape[1]
    if not isinstance(blocks, int) or blocks < k:
        highest = F.pad(highest, (0, k), value=0 if ranks is None else LEAST)
        places = torch.maximum(F.pad(places, (0, k)), first)
    scores, block = topk(highest, k, ordered=ordered)
    return scores, places.gather(1, block).to(torch.int64)


def refine(scores: Tensor, pixels: Tensor) -> Tensor:
    """Sub-pixel positions [B, K, 2] float32 by a softmax over the 5x5 window of the score map around `pixels`, which
    are 2 px inside."""
    width = scores.shape[3]
    window = pixel_grid(5, 5, scores.device).reshape(25, 2) - RADIUS
    steps = (window[:, 1] * width + window[:, 0]).to(torch.int64)
    around = pixels.unsqueeze(2) + steps
    values = _rows(scores).gather(1, around.flatten(1)).reshape(around.shape)
    y, x = quotient(pixels, width)
    centre = torch.stack((x, y), dim=2).float()
    return centre + torch.softmax(values / TEMPERATURE, dim=2) @ window


def detect(scores: Tensor, k: int, threshold: float | None, ranks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keypoints of a score map [B, 1, H, W].

    Args:
        k: how many at most.
        threshold: None takes the k best, in any order, which is cheaper; otherwise only those above it (above the mean
            score, as the original does, if no pixel is), best first.
        ranks: see `select`; not used with a threshold, nor where one TopK is not enough.

    Returns:
        keypoints [B, k, 2] pixels (x, y), and their scores [B, k]: chosen and in order by the score of the maximum's
        pixel, value sampled at the refined position; 0 marks padding.
    """
    if threshold is not None or k > PASS_LIMIT:
        ranks = None
    peak, pixels = select(suppress(scores), k, ordered=threshold is not None, ranks=ranks)
    valid = peak > (0 if ranks is None else LEAST)
    if threshold is not None:
        mean = scores.mean(dim=(1, 2, 3)).unsqueeze(1)
        any_above = peak[:, :1] > threshold
        valid = valid & (peak > torch.where(any_above, torch.full_like(mean, threshold), mean))
    keypoints = refine(scores, pixels)
    value = _rows(sample(scores, keypoints.unsqueeze(1)))
    return keypoints, torch.where(valid, value, torch.zeros_like(value))


def _max5(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2 * RADIUS + 1, stride=1, padding=RADIUS)


def _rows(x: Tensor) -> Tensor:
    """Maps [B, 1, H, W] as [B, H W], said to be channels last, as which ONNX Runtime pools and samples: no copy."""
    return x.permute(0, 2, 3, 1).flatten(1)
