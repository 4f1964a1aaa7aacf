"""Normalised coordinates of maps: x_j = -1 + (2 j + 1) / W at the centre of column j, y alike; channels (x, y)."""

from __future__ import annotations

import torch


def pixel_grid(height: int, width: int) -> torch.Tensor:
    """Own coordinates [1, 2, height, width] of every cell of a map."""
    x = (2.0 * torch.arange(width, dtype=torch.float32) + 1.0) / width - 1.0
    y = (2.0 * torch.arange(height, dtype=torch.float32) + 1.0) / height - 1.0
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)))[None]
