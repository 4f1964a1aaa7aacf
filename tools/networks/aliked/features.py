"""The feature map of ALIKED, read at pixels and between them.

The map has full resolution and unit length in every pixel. It is the sum of four groups of channels, three of which are
upsampled from lower resolutions. Either all of it is computed, or only what is read: the same values up to rounding.
What is read lies in a window of the padded image; outside of it the map is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from matchanything_tools.networks.sampling import pixel_grid, sample, size_xy


class Features(Protocol):
    """Positions are pixels (x, y) of the padded image."""

    def at(self, pixels: Tensor) -> Tensor:
        """[B, P, 2] whole pixels (float32) -> [B, dim, P] float32."""
        ...

    def between(self, positions: Tensor) -> Tensor:
        """[B, P, 2] -> [B, dim, P] float32, bilinear."""
        ...


@dataclass(frozen=True)
class Window:
    """The original image in the padded one: first and last column and row."""

    first: Tensor  # [2] (x, y)
    last: Tensor

    def holds(self, pixels: Tensor) -> Tensor:
        """1.0 where pixels [..., 2] are inside, 0.0 elsewhere, [...]."""
        inside = (pixels >= self.first) & (pixels <= self.last)
        return (inside[..., 0] & inside[..., 1]).float()


class WholeFeatures:
    """Computes the whole map: for many keypoints in few pixels, and for sizes that are not known beforehand."""

    def __init__(self, groups: list[Tensor], window: Window) -> None:
        """groups: [B, *, h, w] of falling resolution, the first at full resolution."""
        size = groups[0].shape[2:]
        full = [groups[0].float(), *(upsample(group.float(), size) for group in groups[1:])]
        lengths = torch.cat([torch.linalg.vector_norm(group, dim=1, keepdim=True) for group in full], dim=1)
        inside = window.holds(pixel_grid(size[0], size[1], groups[0].device))
        factor = inside / torch.linalg.vector_norm(lengths, dim=1, keepdim=True).clamp(min=1e-12)
        self._groups = [group * factor for group in full]

    def at(self, pixels: Tensor) -> Tensor:
        height, width = self._groups[0].shape[2:]
        x, y = pixels.to(torch.int64).unbind(dim=2)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = ((y * width + x) * inside.to(torch.int64)).unsqueeze(1)
        read = [g.flatten(2).gather(2, index.expand(-1, g.shape[1], -1)) for g in self._groups]
        return torch.cat(read, dim=1) * inside.unsqueeze(1).float()

    def between(self, positions: Tensor) -> Tensor:
        return torch.cat([sample(group, positions.unsqueeze(1))[:, :, 0] for group in self._groups], dim=1)


class ReadFeatures:
    """Computes the map only where it is read."""

    def __init__(self, groups: list[Tensor], window: Window) -> None:
        """As WholeFeatures."""
        self._groups = [group.float() for group in groups]
        self._window = window

    def at(self, pixels: Tensor) -> Tensor:
        return self._weighted(pixels, self._window.holds(pixels))

    def between(self, positions: Tensor) -> Tensor:
        first = positions.floor()
        part = positions - first
        corners, weights = [], []
        for dy in (0, 1):
            for dx in (0, 1):
                corners.append(first + torch.tensor((dx, dy), dtype=torch.float32, device=positions.device))
                x, y = part.unbind(dim=2)
                weights.append((x if dx else 1 - x) * (y if dy else 1 - y))
        pixels = torch.cat(corners, dim=1)  # [B, 4 P, 2]
        read = self._weighted(pixels, 4 * torch.cat(weights, dim=1) * self._window.holds(pixels))
        # The sum over the four corners as their mean: pooling is faster than a sum over an inner axis.
        return F.avg_pool2d(read.unflatten(2, (4, -1)), (4, 1))[:, :, 0]

    def _weighted(self, pixels: Tensor, weights: Tensor) -> Tensor:
        """The unit features at whole pixels [B, P, 2], times weights [B, P]."""
        size = size_xy(self._groups[0])
        read = []
        for group in self._groups:
            # Upsampling aligns the corner pixels.
            position = pixels * ((size_xy(group) - 1) / (size - 1))
            read.append(sample(group, position.unsqueeze(1))[:, :, 0])
        features = torch.cat(read, dim=1)
        length = torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12)
        return features * (weights.unsqueeze(1) / length)


def upsample(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, corner pixels aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
