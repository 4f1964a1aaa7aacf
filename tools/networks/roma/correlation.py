"""Local correlation: a feature of one image against a window of the other, around where the flow points.

The offsets of the window are whole cells, so all samples of a window share one bilinear fraction: correlate at the
(2r+2)^2 whole cells around it, then blend those numbers, instead of sampling (2r+1)^2 feature vectors.
"""

from __future__ import annotations

from itertools import pairwise

import torch

VOLUME_CELLS = 20_000  # maps up to this many cells: products of all pairs, of which those of the window are picked
PIECE_BYTES = 128 << 20  # larger maps: the features of the window are gathered. Either way in pieces of about this size


def local_correlation(x: torch.Tensor, y: torch.Tensor, flow: torch.Tensor, radius: int) -> torch.Tensor:
    """x . y(flow + offset) / sqrt(C) for offsets -radius..radius in both directions.

    x, y: features [B, C, H, W]; flow: normalised target [B, 2, H, W], float32. Outside the map y is zero.
    Returns [B, (2 radius + 1)^2, H, W] in the type of x, offsets row by row.
    """
    batch, channels, height, width = x.shape
    left = (x * channels**-0.5).flatten(2).transpose(1, 2)
    right = y.flatten(2).transpose(1, 2)
    column, inside_x, fraction_x = _window(flow[:, 0], width, radius)
    row, inside_y, fraction_y = _window(flow[:, 1], height, radius)
    side = 2 * radius + 2
    index = (row[:, :, :, None] * width + column[:, :, None, :]).flatten(2)
    dots = _dots(left, right, index).float().unflatten(2, (side, side))
    dots = dots * (inside_y[:, :, :, None] * inside_x[:, :, None, :])
    dots = dots[:, :, :-1] + fraction_y[..., None] * (dots[:, :, 1:] - dots[:, :, :-1])
    dots = dots[..., :-1] + fraction_x[..., None] * (dots[..., 1:] - dots[..., :-1])
    return dots.to(x.dtype).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def _window(target: torch.Tensor, size: int, radius: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Along one axis of target [B, H, W]: cells [B, HW, 2r+2] within the map, 1 where inside, fraction [B, HW, 1]."""
    position = ((target.flatten(1)[..., None] + 1.0) * size - 1.0) / 2.0
    first = torch.floor(position)
    cells = first + torch.arange(-radius, radius + 2, dtype=torch.float32)
    inside = ((cells >= 0) & (cells <= size - 1)).float()
    return cells.clamp(0, size - 1).to(torch.int64), inside, position - first


def _dots(left: torch.Tensor, right: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """left[b, n] . right[b, index[b, n, k]] -> [B, N, K]."""
    batch, cells, channels = left.shape
    window = index.shape[2]
    volume = cells <= VOLUME_CELLS
    row_bytes = left.element_size() * (cells if volume else window * channels)
    pieces = -(-cells * row_bytes // PIECE_BYTES)
    edges = [cells * i // pieces for i in range(pieces + 1)]
    results = []
    for b in range(batch):
        for start, end in pairwise(edges):
            some, where = left[b, start:end], index[b, start:end]
            if volume:
                results.append((some @ right[b].T).gather(1, where))
            else:
                near = right[b].index_select(0, where.flatten()).unflatten(0, (end - start, window))
                results.append((near @ some[:, :, None])[..., 0])
    return torch.cat(results).unflatten(0, (batch, cells))
