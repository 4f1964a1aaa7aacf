"""From a dense warp to K matches, the same ones each time and spread over the images.

The original draws at random: uniformly where certainty is above 0.05, thinned where matches are dense. Here instead:

1. The best pixel of every fine cell (4 x 4 pixels) is a candidate, in both directions.
2. The candidates of one coarse cell (16 x 16 pixels) are ranked by certainty.
3. First come the best of all coarse cells, then all second bests, and so on; those of one rank by certainty.
   Candidates at or below 0.05 come last of all.
4. The first K are returned, best certainty first.

Hence a small overlap is filled densely and a large one evenly, and no neighbourhood takes more than its share.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from matchanything_tools.networks.topk import quotient, topk, topk_blocks

FINE, COARSE = 4, 16  # sides of the cells, in pixels of the network's input
CERTAIN = 0.05


def candidates(height: int, width: int, stride: int = 1) -> int:
    """How many matches there can be in a map of this size, of which one cell is `stride` input pixels wide."""
    fine, coarse = _sides(stride)
    cells = -(-height // coarse) * -(-width // coarse)
    return 2 * cells * (coarse // fine) ** 2


def select(
    flow: torch.Tensor, certainty: torch.Tensor, count: int, image: tuple[int, int], stride: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The matches of flow [2, 2, H, W] (normalised) with certainty [2, 1, H, W]; element 0 goes from image 0 to 1.

    image: (height, width) of the network's input; stride: input pixels per cell of the map.
    Returns keypoints0, keypoints1 [count, 2] in input pixels, centres at integers, and scores [count], best first.
    """
    fine, coarse = _sides(stride)
    ratio = coarse // fine
    height, width = certainty.shape[2:]
    padded = F.pad(certainty.squeeze(1), (0, -width % coarse, 0, -height % coarse))
    rows, columns = padded.shape[1] // coarse, padded.shape[2] // coarse
    cells = padded.reshape(2, rows, ratio, fine, columns, ratio, fine).permute(0, 1, 4, 2, 5, 3, 6)
    cells = cells.reshape(2 * rows * columns, ratio * ratio, fine * fine)
    pixel = cells.argmax(2)
    highest = cells.gather(2, pixel[:, :, None]).squeeze(2)  # amax(2) takes 21 us on an H200
    best, order = torch.topk(highest, ratio * ratio, dim=1)  # along a row: its rank
    turns = torch.arange(ratio * ratio, 0, -1, dtype=torch.float32)
    priority = torch.where(best > CERTAIN, best + turns, best).flatten()
    block = math.isqrt(len(priority) // count)  # neighbours are ranks of one cell
    if block > 1:
        chosen = topk_blocks(priority[None], count, block=block, ordered=False)[1][0]
    else:
        chosen = topk(priority, count, ordered=False)[1]
    scores, by_score = topk(best.flatten().index_select(0, chosen), count)
    chosen = chosen.index_select(0, by_score)

    cell, _ = quotient(chosen, ratio * ratio)
    part = order.flatten().index_select(0, chosen)
    inner = pixel.flatten().index_select(0, cell * (ratio * ratio) + part)
    direction, place = quotient(cell, rows * columns)
    steps = [quotient(index, divisor) for index, divisor in ((place, columns), (part, ratio), (inner, fine))]
    y, x = (large * coarse + small * fine + least for large, small, least in zip(*steps, strict=True))
    y, x = y.clamp(max=height - 1), x.clamp(max=width - 1)  # the padding has no certainty

    # Read from the planes of x and y: to turn the whole flow around takes longer than all of this.
    planes, place = flow.flatten(), (2 * direction * height + y) * width + x
    target = torch.stack([planes.index_select(0, place + i * height * width) for i in (0, 1)], 1).clamp(-1.0, 1.0)
    own = torch.stack(((2.0 * x + 1.0) / width - 1.0, (2.0 * y + 1.0) / height - 1.0), 1)
    size = torch.tensor([image[1], image[0]], dtype=torch.float32)
    own, target = (0.5 * size * (coordinates + 1.0) - 0.5 for coordinates in (own, target))
    forward = (direction == 0)[:, None]
    return torch.where(forward, own, target), torch.where(forward, target, own), scores


def _sides(stride: int) -> tuple[int, int]:
    """Sides of the fine and coarse cells in cells of the map."""
    fine = max(1, FINE // stride)
    return fine, fine * (COARSE // FINE if stride <= FINE else 2)
