"""Sparse deformable descriptor head (SDDH) of ALIKED: features around each keypoint -> one descriptor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchanything_tools.networks.aliked.features import Features
from matchanything_tools.networks.sampling import pixel_grid


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

    def forward(self, features: Features, keypoints: Tensor, limit: float) -> Tensor:
        """Descriptors [B, K, dim] float32 of unit length.

        keypoints: [B, K, 2] in pixels of the padded image. limit: the largest offset in pixels.
        """
        batch, count = keypoints.shape[:2]
        dim, dtype = self.sf_conv.in_channels, self.sf_conv.weight.dtype
        around = keypoints.floor().unsqueeze(2) + (pixel_grid(3, 3, keypoints.device).reshape(9, 2) - 1)
        patches = features.at(around.reshape(batch, -1, 2)).to(dtype)
        patches = patches.reshape(batch, dim, count, 9).transpose(1, 2).reshape(batch * count, dim, 3, 3)
        offsets = self.offset_conv(patches).reshape(batch, count, 2, self.positions)
        offsets = offsets.float().clamp(-limit, limit).transpose(2, 3)  # M x positions, then M y positions
        positions = (keypoints.unsqueeze(2) + offsets).reshape(batch, -1, 2)
        sampled = F.selu(self.sf_conv(features.between(positions).to(dtype).unsqueeze(2)))  # [B, dim, 1, K M]
        sampled = sampled.reshape(batch, dim, count, self.positions).permute(0, 2, 3, 1)
        descriptors = sampled.reshape(batch, count, -1) @ self.agg_weights.flatten(0, 1)
        return F.normalize(descriptors.float(), dim=2)
