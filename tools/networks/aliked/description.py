"""Sparse deformable descriptor head (SDDH) of ALIKED: features around each keypoint -> one descriptor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchanything_tools.networks.aliked.features import Features
from matchanything_tools.networks.lengths import of_unit_length
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
        dim, dtype, positions = self.sf_conv.in_channels, self.sf_conv.weight.dtype, self.positions
        batch, count = keypoints.shape[:2]
        around = keypoints.floor().unsqueeze(2) + (pixel_grid(3, 3, keypoints.device).reshape(9, 2) - 1)
        # Keypoints are the rows and their pixels or positions the columns of maps, which all layers below read as they
        # are: the convolution of a 3x3 patch is a product, and so is that of a position.
        first, second = self.offset_conv[0], self.offset_conv[2]
        assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d) and second.bias is not None
        assert first.bias is not None
        patches = features.at(around).to(dtype).reshape(batch * count, 9 * dim)
        hidden = F.selu(torch.addmm(first.bias, patches, first.weight.permute(2, 3, 1, 0).reshape(9 * dim, -1)))
        offsets = torch.addmm(second.bias, hidden, second.weight.flatten(1).T).float().clamp(-limit, limit)
        around = keypoints.unsqueeze(3) + offsets.reshape(batch, count, 2, positions)  # all x, then all y
        sampled = features.between(around.transpose(2, 3)).to(dtype)
        sampled = F.selu(F.linear(sampled, self.sf_conv.weight.flatten(1)))  # [B, K, M, dim]
        return of_unit_length((sampled.flatten(2) @ self.agg_weights.flatten(0, 1)).float())
