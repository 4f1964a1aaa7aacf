"""The fine level of EfficientLoFTR: a feature pyramid, windows around the coarse matches, and two stages of refinement.

The original upsamples the pyramid to full resolution and cuts windows out of it. Here windows are cut out at half
resolution and upsampled alone, by a constant matrix: the same numbers, without the largest tensor of the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import conv_from, fold_batch_norm
from .coarse import quotient

CELL = 8  # pixels of a coarse cell
MATCHING = 56  # channels of the first stage; the 8 others serve the second


class FeaturePyramid(nn.Module):
    """Coarse features and backbone features at 1/4 and 1/2 -> fine features at 1/2. Names are the published keys."""

    def __init__(self) -> None:
        super().__init__()
        self.layer3_outconv: nn.Module = nn.Conv2d(256, 256, 1, bias=False)
        self.layer2_outconv = nn.Conv2d(128, 256, 1, bias=False)
        self.layer2_outconv2 = _two_convs(256, 128)
        self.layer1_outconv = nn.Conv2d(64, 128, 1, bias=False)
        self.layer1_outconv2 = _two_convs(128, 64)

    def fuse(self) -> None:
        """Fold the batch norms, and the division of the coarse features by 16 (exact: a power of two)."""
        assert isinstance(self.layer3_outconv, nn.Conv2d)
        self.layer3_outconv = conv_from(self.layer3_outconv.weight / 16, None)
        for name in ("layer2_outconv2", "layer1_outconv2"):
            first, norm, activation, second = getattr(self, name)
            fused = conv_from(*fold_batch_norm(first.weight, norm))
            setattr(self, name, nn.Sequential(fused, activation, second))

    def forward(self, coarse: Tensor, quarter: Tensor, half: Tensor) -> Tensor:
        x = self.layer2_outconv2(_double(self.layer3_outconv(coarse)) + self.layer2_outconv(quarter))
        return self.layer1_outconv2(_double(x) + self.layer1_outconv(half))


def windows(features: Tensor, cells: Tensor, columns: int) -> Tensor:
    """Cut 6x6 pixels at half resolution around every cell: what its 8x8 pixels and a ring of one are made of.

    features [1, D, H/2, W/2]; cells [K], index = row * columns + column. Returns [K, 36, D].
    """
    channels, height, width = features.shape[1], features.shape[2], features.shape[3]
    offset = torch.arange(6, device=cells.device) - 1
    row, column = quotient(cells, columns)
    rows = (4 * row[:, None] + offset).clamp(0, height - 1)
    cols = (4 * column[:, None] + offset).clamp(0, width - 1)
    index = (rows[:, :, None] * width + cols[:, None, :]).reshape(-1)
    table = features.reshape(channels, height * width).T
    return table.index_select(0, index).reshape(-1, 36, channels)


class Refinement(nn.Module):
    """Half-resolution windows [K, 36, 64] of both images -> offsets [K, 2] in pixels from their cells' corners.

    Stage 1 takes the most confident pair of pixels by dual softmax, stage 2 the expectation over 3x3 correlations.
    """

    up0: Tensor
    up1: Tensor
    up1_inner_first: Tensor
    steps: Tensor
    wrapped: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, matrix in zip(("up0", "up1", "up1_inner_first"), _upsampling(), strict=True):
            self.register_buffer(name, matrix, persistent=False)
        step = torch.arange(3) - 1
        steps = torch.stack([step.repeat(3), step.repeat_interleave(3)], 1).float()  # [9, 2]: (x, y)
        self.register_buffer("steps", steps, persistent=False)
        # The original takes the 3x3 window on the 10x10 grid at the index found on the 8x8 grid, without adding the
        # ring: it is centred one pixel up and left of the match, and wraps around at 0. It was trained so.
        side = (torch.arange(8)[:, None] + step) % 10  # [8, 3]
        wrapped = side[:, None, :, None] * 10 + side[None, :, None, :]
        self.register_buffer("wrapped", wrapped.reshape(64, 9), persistent=False)

    def forward(self, windows0: Tensor, windows1: Tensor) -> tuple[Tensor, Tensor]:
        # Constant matrices stand on the right of every product: runtimes then see one large product, not K small ones.
        (first0, last0), (first1, last1) = (
            (part.float() for part in window.split([MATCHING, 64 - MATCHING], -1)) for window in (windows0, windows1)
        )
        half = (first1 @ first0.transpose(1, 2)) @ self.up0.T  # [K, 36, 64]: image 1 still at half resolution
        half = half.transpose(1, 2) * (1 / 64)  # 64: all channels, as in the original
        # The ring around the 8x8 pixels of image 1 counts in the sum over image 1 only.
        conf = torch.softmax(half @ self.up0.T, 1) * torch.softmax(half @ self.up1_inner_first.T, 2)[..., :64]
        pixel0, pixel1 = quotient(conf.flatten(1).argmax(1), 64)

        gram = last0 @ last1.transpose(1, 2)
        correlation = (self.up0.index_select(0, pixel0)[:, None] @ gram)[:, 0] @ self.up1.T * (1 / 8**0.5)
        window = correlation.gather(1, self.wrapped.index_select(0, pixel1))
        shift = torch.softmax(window / 10, 1) @ self.steps
        return _from_corner(pixel0), _from_corner(pixel1) + shift


def _from_corner(pixel: Tensor) -> Tensor:
    """Index on the 8x8 grid [K] -> (x, y) float32 [K, 2]; the half pixels are part of what was trained."""
    row, column = quotient(pixel, CELL)
    return torch.stack([column, row], 1).float() - (CELL - 1) / 2


def _upsampling() -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear weights from 6x6 half-resolution pixels: [64, 36] for 8x8 pixels, [100, 36] for 10x10, and the latter
    with the 64 inner pixels before the ring."""
    position = (torch.arange(-1, 9) + 0.5) / 2 - 0.5
    axis = (1 - (position[:, None] - torch.arange(-1, 5)).abs()).clamp(min=0)  # [10, 6]
    inner = axis[1:9]
    up0, up1 = torch.kron(inner, inner), torch.kron(axis, axis)
    grid = torch.arange(100).reshape(10, 10)
    is_inner = torch.zeros(10, 10, dtype=torch.bool)
    is_inner[1:9, 1:9] = True
    return up0, up1, up1[torch.cat([grid[is_inner], grid[~is_inner]])]


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _two_convs(channels: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(),
        nn.Conv2d(channels, channels_out, 3, padding=1, bias=False),
    )
