"""Images of any size for ALIKED: their border pixels are repeated until both sides are multiples of 32."""

from __future__ import annotations

import torch
from torch import Tensor

from matchanything_tools.networks.stripes import StripedConv

DIVISOR = 32  # the lowest resolution is 1/32


def surplus(side: int) -> int:
    """How many pixels a side gets, half of them before it, rounded down."""
    return (side + DIVISOR - 1) // DIVISOR * DIVISOR - side


def places(side: int, like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Which pixel of the image each pixel of the padded side is."""
    place = torch.arange(side + surplus(side), dtype=dtype, device=like.device) - surplus(side) // 2
    return place.clamp(min=0, max=side - 1)


def pad_edges(image: Tensor) -> Tensor:
    """[B, C, H, W] -> the same with both sides multiples of 32."""
    for axis in (2, 3):
        side = image.shape[axis]
        if not isinstance(side, int) or surplus(side):
            image = image.index_select(axis, places(side, image))
    return image


class PaddingConv(StripedConv):
    """The first convolution over stripes, of images as they are: one Gather pads them and puts them into stripes.

    33 us instead of 52 for two images of 376x1241 on an H200.
    """

    def forward(self, x: Tensor, below: int = 0, right: int = 0) -> Tensor:
        """[B, 3, H, W] -> [B, O, H', W'], where H' and W' are multiples of 32."""
        batch, channels, height, width = x.shape
        if not surplus(height) and not surplus(width):
            return super().forward(x)
        row, column = (places(side, x, torch.int32) for side in (height, width))
        plane = torch.arange(channels + int(self.colours), dtype=torch.int32, device=x.device) % channels
        # [H', stripes, planes, columns]; a fourth plane, which has no weight, is the first again.
        index = (plane.unsqueeze(1) * height + row.reshape(-1, 1, 1, 1)) * width + column.reshape(-1, 1, self.columns)
        stripes = x.flatten(1).index_select(1, index.flatten())
        return self.of_stripes(stripes.reshape(batch, index.shape[0], index.shape[1], -1))
