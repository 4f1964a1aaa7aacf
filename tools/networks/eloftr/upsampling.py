"""Bilinear upsampling (align_corners=False) by whole factors as products with constant matrices.

As in networks/upsampling.py, but with matrices that are stored, and in the order of axes that the transformer's blocks
have anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from matchanything_tools.networks.products import transposed_matmul
from matchanything_tools.networks.upsampling import weights


def axis_weights(count: int, factor: int) -> Tensor:
    """[factor * count, count]: rows are the weights of the old pixels in each new one."""
    return weights(count, factor * count, align_corners=False, like=torch.empty(0))


class Double(nn.Module):
    """[B, W, H, C], columns first and of fixed size, to [B, C, 2 (H + margin), 2 (W + margin)].

    padded: whether there are zeros (below, right of) the images. margins: how many of them to upsample, too.
    """

    down: Tensor
    across: Tensor

    def __init__(
        self,
        height: int,
        width: int,
        padded: tuple[bool, bool] = (False, False),
        margins: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        for name, count, zeros, margin in zip(("down", "across"), (height, width), padded, margins, strict=True):
            matrix = axis_weights(count + margin + zeros, 2)[: 2 * (count + margin), :count].T
            self.register_buffer(name, matrix[None].contiguous(), persistent=False)

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
