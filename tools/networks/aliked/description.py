"""Sparse deformable descriptor head (SDDH) of ALIKED: features around each keypoint -> one descriptor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchanything_tools.networks.sampling import pixel_grid, sample


class DescriptorHead(nn.Module):
    """Samples M positions that the features themselves choose and aggregates them."""

    def __init__(self, dim: int, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.offset_conv = nn.Sequential(
            nn.Conv2d(dim, 2 * positions, 3), nn.SELU(), nn.Conv2d(2 * positions, 2 * positions, 1)
        )
        self.sf_conv = nn.Conv2d(dim, dim, 1, bias=False)
        self.agg_weights = nn.Parameter(torch.empty(positions, dim, dim))

    def forward(self, features: list[Tensor], keypoints: Tensor, limit: float) -> Tensor:
        """Descriptors [B, K, dim] float32 of unit length.

        features: groups of channels, [B, *, H, W] each, dim channels in all. keypoints: [B, K, 2] in pixels of these
        maps. limit: the largest offset in pixels.
        """
        batch, count = keypoints.shape[:2]
        dim = self.sf_conv.in_channels
        pixels = keypoints.to(torch.int64)
        patches = torch.cat([patches3x3(group, pixels) for group in features], dim=1)  # [B, dim, K, 9]
        patches = patches.to(self.sf_conv.weight.dtype).transpose(1, 2).reshape(batch * count, dim, 3, 3)
        offsets = self.offset_conv(patches).reshape(batch, count, 2, self.positions)
        offsets = offsets.float().clamp(-limit, limit).transpose(2, 3)  # M x positions, then M y positions
        positions = keypoints.unsqueeze(2) + offsets
        sampled = torch.cat([sample(group, positions) for group in features], dim=1)  # [B, dim, K, M]
        sampled = F.selu(self.sf_conv(sampled.to(self.sf_conv.weight.dtype)))
        sampled = sampled.permute(0, 2, 3, 1).reshape(batch, count, self.positions * dim)
        descriptors = sampled @ self.agg_weights.reshape(self.positions * dim, dim)
        return F.normalize(descriptors.float(), dim=2)


def patches3x3(features: Tensor, pixels: Tensor) -> Tensor:
    """3x3 patches [B, C, K, 9] of [B, C, H, W] around integer pixels [B, K, 2] (x, y), zero outside the map."""
    batch, channels, height, width = features.shape
    around = pixels.unsqueeze(2) + (pixel_grid(3, 3, features.device).reshape(9, 2) - 1).to(torch.int64)
    x, y = around[..., 0], around[..., 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = (y * width + x) * inside.to(torch.int64)
    gathered = features.reshape(batch, channels, -1).gather(2, index.reshape(batch, 1, -1).expand(-1, channels, -1))
    return gathered.reshape(batch, channels, -1, 9) * inside.unsqueeze(1).to(features.dtype)
