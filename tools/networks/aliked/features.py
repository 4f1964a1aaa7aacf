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

from matchanything_tools.networks.lengths import lengths, lengths_in_blocks
from matchanything_tools.networks.sampling import pixel_grid, read_rows, sample
from matchanything_tools.networks.upsampling import upsampled_sum


class Features(Protocol):
    """Positions are pixels (x, y) of the padded image."""

    def at(self, pixels: Tensor) -> Tensor:
        """Whole pixels [B, K, N, 2] (float32) -> [B, K, N, dim]."""
        ...

    def between(self, positions: Tensor) -> Tensor:
        """Bilinear samples, [B, K, M, 2] -> [B, K, M, dim]."""
        ...


@dataclass(frozen=True)
class Window:
    """The original image in the padded one: first and last column and row."""

    first: Tensor  # [2] (x, y)
    last: Tensor

    def holds(self, pixels: Tensor) -> Tensor:
        """1.0 where whole pixels [B, P, Q, 2] are inside, 0.0 elsewhere, [B, 1, P, Q].

        Reads a map of one pixel, stretched over the window and half a pixel more, at the nearest pixel: one operation.
        """
        grid = (pixels - (self.first + self.last) / 2) * (2 / (self.last - self.first + 1))
        one = torch.ones(1, 1, 1, 1, device=pixels.device).expand(pixels.shape[0], -1, -1, -1)
        return F.grid_sample(one, grid, mode="nearest", padding_mode="zeros", align_corners=False)


class WholeFeatures:
    """Computes the whole map: for many keypoints in few pixels, and for sizes that are not known beforehand."""

    def __init__(self, groups: list[Tensor], window: Window) -> None:
        """groups: [B, *, h, w] of falling resolution, the first at full resolution."""
        size = groups[0].shape[2:]
        full = [groups[0].float(), *(upsample(group.float(), size) for group in groups[1:])]
        lengths = torch.cat([torch.linalg.vector_norm(group, dim=1, keepdim=True) for group in full], dim=1)
        inside = window.holds(pixel_grid(size[0], size[1], groups[0].device).unsqueeze(0))
        factor = inside / torch.linalg.vector_norm(lengths, dim=1, keepdim=True).clamp(min=1e-12)
        self._groups = [group * factor for group in full]

    def at(self, pixels: Tensor) -> Tensor:
        height, width = self._groups[0].shape[2:]
        x, y = pixels.to(torch.int64).flatten(1, 2).unbind(dim=2)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = ((y * width + x) * inside.to(torch.int64)).unsqueeze(1)
        read = [g.flatten(2).gather(2, index.expand(-1, g.shape[1], -1)) for g in self._groups]
        rows = (torch.cat(read, dim=1) * inside.unsqueeze(1).float()).transpose(1, 2)
        return rows.unflatten(1, pixels.shape[1:3])

    def between(self, positions: Tensor) -> Tensor:
        return torch.cat([sample(group, positions) for group in self._groups], dim=1).permute(0, 2, 3, 1)


class ReadFeatures:
    """Computes the map only where it is read, in channels-last order, in which ONNX Runtime works on a GPU, too.

    In fp16 the groups are upsampled first, by products, and their rows gathered: faster there than GridSample.
    """

    def __init__(self, groups: list[Tensor], window: Window) -> None:
        """As WholeFeatures; the size must be fixed for fp16."""
        height, width = (int(side) for side in groups[0].shape[2:])
        self._window = window
        self._low: list[Tensor] = []
        if groups[0].dtype == torch.float16:
            low = [upsampled_sum([group], (height, width), align_corners=True) for group in groups[1:]]
            self._full = [groups[0], *low]
        else:
            self._full, self._low = groups[:1], groups[1:]

    def at(self, pixels: Tensor) -> Tensor:
        inside = self._window.holds(pixels).reshape(-1, 1)
        x, y = torch.minimum(torch.maximum(pixels, self._window.first), self._window.last).split(1, dim=3)
        # As a matrix, for whose rows ONNX Runtime has a faster kernel than for broadcasting along any other axis.
        rows = self._read(x, y)
        return (rows * (inside / lengths(rows)).to(rows.dtype)).reshape(*pixels.shape[:3], -1)

    def between(self, positions: Tensor) -> Tensor:
        batch, count, number = positions.shape[:3]
        positions = positions.transpose(2, 3)  # all x, then all y, as the offsets come: taken apart at little cost
        first, last = (edge.reshape(2, 1, 1) for edge in (self._window.first, self._window.last))
        # The two columns and the two rows around each sample, and what of it is theirs: nothing outside the window.
        corners = positions.floor().unsqueeze(4) + torch.arange(2, dtype=torch.float32, device=positions.device)
        nearest = torch.minimum(torch.maximum(corners, first), last)
        shares = 1 - (corners - positions.unsqueeze(4)).abs()
        shares = torch.where(nearest == corners, shares, shares.new_zeros(()))
        x, y, across, down = (half.squeeze(2) for both in (nearest, shares) for half in both.split(1, dim=2))
        rows = self._read(x.unsqueeze(3), y.unsqueeze(4)).unflatten(0, (batch * count, number * 4))
        weights = (across.unsqueeze(3) * down.unsqueeze(4)).reshape(batch * count, -1)
        weights = (weights / lengths_in_blocks(rows)).to(rows.dtype)
        # All samples of a keypoint by one product, most of whose weights are zero: to scale all corners and then sum
        # fours of them takes two passes over them.
        own = torch.eye(number, dtype=rows.dtype, device=rows.device).repeat_interleave(4, dim=1)
        return ((own * weights.unsqueeze(1)) @ rows).reshape(batch, count, number, -1)

    def _read(self, x: Tensor, y: Tensor) -> Tensor:
        """The features at whole pixels of the map, x and y [B, ...] broadcast to P of them, as rows [B P, dim], not of
        unit length."""
        parts = read_rows(self._full, x, y)
        if self._low:
            # Upsampling aligns the corner pixels, so the same grid reads every resolution.
            height, width = self._full[0].shape[2:]
            x, y = torch.broadcast_tensors(x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1)
            grid = torch.stack((x, y), dim=-1).reshape(x.shape[0], 1, -1, 2)
            for group in self._low:
                sampled = F.grid_sample(group, grid, align_corners=True)
                parts.append(sampled.permute(0, 2, 3, 1).flatten(0, 2))
        return torch.cat(parts, dim=1)


def upsample(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, corner pixels aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
