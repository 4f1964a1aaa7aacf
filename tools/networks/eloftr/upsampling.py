"""Bilinear upsampling (align_corners=False) as products with constant matrices.

On GPUs such products run at the speed of memory and in the layout that convolutions want. ONNX Runtime's own upsampling
takes the other layout, and is several times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from matchanything_tools.networks.products import transposed_matmul


def axis_weights(count: int, factor: int) -> Tensor:
    """[factor * count, count]: rows are the weights of the old pixels in each new one."""
    position = ((torch.arange(factor * count) + 0.5) / factor - 0.5).clamp(0, count - 1)
    return (1 - (position[:, None] - torch.arange(count)).abs()).clamp(min=0)


class Double(nn.Module):
    """[B, W, H, C], columns first and of fixed size, to [B, C, 2 H, 2 W].

    below, right: rows and columns of zeros around the images that are there for the upsampling alone.
    """

    down: Tensor
    across: Tensor

    def __init__(self, height: int, width: int, below: int = 0, right: int = 0) -> None:
        super().__init__()
        for name, count, surplus in (("down", height, below), ("across", width, right)):
            weights = axis_weights(count + surplus, 2)[:, :count].T
            self.register_buffer(name, weights[None].contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, channels = x.shape
        down, across = (matrix.expand(batch, -1, -1) for matrix in (self.down, self.across))
        wide = transposed_matmul(across, x.reshape(batch, width, height * channels))
        columns = wide.shape[1]
        rows_first = wide.reshape(batch, columns, height, channels).permute(0, 2, 1, 3)
        full = transposed_matmul(down, rows_first.reshape(batch, height, columns * channels))
        return full.reshape(batch, full.shape[1], columns, channels).permute(0, 3, 1, 2)


def double(x: Tensor) -> Tensor:
    """[B, C, H, W] of any size to twice the size."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
