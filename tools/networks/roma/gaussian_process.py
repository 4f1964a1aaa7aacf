"""The Gaussian process of RoMa: where each token of one image lies in the other, as a regression (DKM, CVPR 2023)."""

from __future__ import annotations

import math

import torch
from torch import nn

from matchanything_tools.networks.roma.grids import pixel_grid
from matchanything_tools.networks.roma.solve import solve_spd

NOISE = 0.1  # on the diagonal of the kernel matrix
TEMPERATURE = 0.2
WIDTH = 512


class GaussianProcess(nn.Module):
    """Features [2, N, 512] of both images -> posterior mean [2, N, 512] at each, observed at those of the other.

    The regression targets are Fourier features of the other's positions: constants of the map's size. In float32 only:
    the kernel matrix is ill-conditioned (up to 16000 on an image without structure).
    """

    def __init__(self) -> None:
        super().__init__()
        self.pos_conv = nn.Conv2d(2, WIDTH, 1)

    def bake(self, height: int, width: int) -> None:
        """Fix the size of the maps: the targets become a constant."""
        self.fixed = nn.Parameter(self.targets(height, width).contiguous(), requires_grad=False)

    def targets(self, height: int, width: int) -> torch.Tensor:
        """Fourier features [1, height*width, 512] of the grid of y."""
        features = torch.cos(8 * math.pi * self.pos_conv(pixel_grid(height, width)))
        return features.flatten(2).transpose(1, 2)

    def forward(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        targets = self.fixed if hasattr(self, "fixed") else self.targets(height, width)
        directions = unit(features)
        covariance = kernel(directions, directions) + NOISE * torch.eye(features.shape[1])
        weights = solve_spd(covariance, targets, NOISE, 1.0 + NOISE)
        across = kernel(directions[:1], directions[1:]).squeeze(0)
        return torch.stack((across @ weights[1], across.T @ weights[0]))


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp((cos(x, y) - 1) / temperature) for all pairs of [B, N, C] and [B, M, C], of length 1 -> [B, N, M]."""
    return torch.exp((x / TEMPERATURE) @ y.transpose(1, 2) - 1.0 / TEMPERATURE)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors [B, N, C] at length 1; those of length 0 stay."""
    return x / (torch.sqrt((x * x).sum(2, keepdim=True)) + 1e-9)
