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

    def forward(self, features: Tensor, keypoints: Tensor) -> Tensor:
        """Feature map [B, dim, H, W] and keypoints [B, K, 2] in pixels -> descriptors [B, K, dim] of unit length, float32."""
        batch, dim, height, width = features.shape
        count = keypoints.shape[1]
        limit = max(height, width) / 4
        patches = patches3x3(features, keypoints.to(torch.int64))
        offsets = self.offset_conv(patches).reshape(batch, count, 2, self.positions)
        offsets = offsets.float().clamp(-limit, limit).transpose(2, 3)  # M x positions, then M y positions
        sampled = sample(features, keypoints.unsqueeze(2) + offsets)  # [B, dim, K, M]
        sampled = F.selu(self.sf_conv(sampled)).permute(0, 2, 3, 1).reshape(batch, count, self.positions * dim)
        descriptors = sampled @ self.agg_weights.reshape(self.positions * dim, dim)
        return F.normalize(descriptors.float(), dim=2)


def patches3x3(features: Tensor, pixels: Tensor) -> Tensor:
    """3x3 patches [B * K, C, 3, 3] of [B, C, H, W] around integer pixels [B, K, 2] (x, y), zero outside the map."""
    batch, channels, height, width = features.shape
    count = pixels.shape[1]
    around = pixels.unsqueeze(2) + (pixel_grid(3, 3, features.device).reshape(9, 2) - 1).to(torch.int64)
    x, y = around[..., 0], around[..., 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = (y * width + x) * inside.to(torch.int64)
    flat = features.reshape(batch, channels, -1)
    gathered = flat.gather(2, index.reshape(batch, 1, -1).expand(-1, channels, -1))
    gathered = gathered * inside.reshape(batch, 1, -1).to(features.dtype)
    return gathered.reshape(batch, channels, count, 9).permute(0, 2, 1, 3).reshape(batch * count, channels, 3, 3)
