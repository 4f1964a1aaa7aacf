"""The fine level of EfficientLoFTR: a feature pyramid, windows around the coarse matches, and two stages of refinement.

The original upsamples the pyramid to full resolution and cuts windows out of it. Here windows are cut out at half
resolution and upsampled alone, by a constant matrix: the same numbers, without the largest tensor of the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from matchanything_tools.networks.topk import quotient

from .backbone import conv_from, fold_batch_norm
from .upsampling import axis_weights

CELL = 8  # pixels of a coarse cell
Upsample = Callable[[Tensor], Tensor]
MATCHING = 56  # channels of the first stage; the 8 others serve the second


class FeaturePyramid(nn.Module):
    """Coarse features and backbone features at 1/4 and 1/2 -> fine features at 1/2. Names are the published keys."""

    from_coarse: Tensor
    from_quarter: Tensor
    from_half: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer3_outconv = nn.Conv2d(256, 256, 1, bias=False)
        self.layer2_outconv = nn.Conv2d(128, 256, 1, bias=False)
        self.layer2_outconv2 = _two_convs(256, 128)
        self.layer1_outconv = nn.Conv2d(64, 128, 1, bias=False)
        self.layer1_outconv2 = _two_convs(128, 64)

    def fuse(self) -> None:
        """Fold the batch norms, and the division of the coarse features by 16 (exact: a power of two)."""
        self.register_buffer("from_coarse", self.layer3_outconv.weight.detach()[:, :, 0, 0].T.contiguous() / 16)
        del self.layer3_outconv
        for name, conv in (("from_quarter", "layer2_outconv"), ("from_half", "layer1_outconv")):
            self.register_buffer(name, getattr(self, conv).weight.detach()[:, :, 0, 0].T.contiguous())
            delattr(self, conv)
        for name in ("layer2_outconv2", "layer1_outconv2"):
            first, norm, activation, second = getattr(self, name)
            fused = conv_from(*fold_batch_norm(first.weight, norm))
            setattr(self, name, nn.Sequential(fused, activation, second))

    def forward(self, coarse: Tensor, quarter: Tensor, half: Tensor, to_quarter: Upsample, to_half: Upsample) -> Tensor:
        """coarse [..., C] in any layout that to_quarter turns into a map twice as large; to_half does so with maps.

        Returns a table [B * H/2 * W/2, 64], a row for each pixel.
        """
        x = self.layer2_outconv2(_add_projected(to_quarter(coarse @ self.from_coarse), quarter, self.from_quarter))
        x = self.layer1_outconv2(_add_projected(to_half(x), half, self.from_half))
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _add_projected(x: Tensor, features: Tensor, weight: Tensor) -> Tensor:
    """Map x [B, D, H, W] plus as much of features [B, C, H', W'] times weight [C, D], added before the product is
    rounded."""
    batch, channels, height, width = x.shape
    features = features.permute(0, 2, 3, 1)
    if features.shape[2] != width:
        features = features[:, :, :width]
    if features.shape[1] != height:  # of lines as long vectors: on an H200 25 us instead of 30
        features = features.flatten(2)[:, :height]
    total = x.permute(0, 2, 3, 1).reshape(-1, channels)
    product = torch.addmm(total, features.reshape(-1, weight.shape[0]), weight)
    return product.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def windows(features: Tensor, first: Tensor, stride: int) -> Tensor:
    """Cut 6x6 pixels at half resolution around cells: what their 8x8 pixels and a ring of one are made of.

    features: a row of 64 channels for each pixel. first: [K], of each cell the row of its first pixel.
    stride: pixels in a line. Returns [K, 36, 64]; nonsense for cells at the border, which are never matched.
    """
    offset = torch.arange(6, device=features.device) - 1
    offsets = (offset[:, None] * stride + offset).reshape(-1)
    index = (first[:, None] + offsets).reshape(-1)
    return features.index_select(0, index).reshape(-1, 36, features.shape[1])


class Refinement(nn.Module):
    """Half-resolution windows [K, 36, 64] of both images -> offsets [K, 2] in pixels from their cells' corners.

    Stage 1 takes the most confident pair of pixels by dual softmax, stage 2 the expectation over 3x3 correlations.
    """

    up0: Tensor
    up1: Tensor
    up1_inner_first: Tensor
    steps: Tensor
    wrapped: Tensor
    place: Tensor
    matching: Tensor

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
        # (x, y) of the 64 pixels from their cell's corner; the half pixels are part of what was trained.
        pixel = torch.arange(CELL).float() - (CELL - 1) / 2
        place = torch.stack([pixel.repeat(CELL), pixel.repeat_interleave(CELL)], 1)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("matching", (torch.arange(64) < MATCHING).float(), persistent=False)

    def forward(self, windows0: Tensor, windows1: Tensor) -> tuple[Tensor, Tensor]:
        # Constant matrices stand on the right of every product: runtimes then see one large product, not K small ones.
        # The channels of the second stage become zeros in one of the images, and are read from a cut-out of each.
        first0, first1 = windows0.float(), (windows1 * self.matching.to(windows1.dtype)).float()
        last0, last1 = (window[..., MATCHING:].float() for window in (windows0, windows1))
        half = (first1 @ first0.transpose(1, 2)) @ self.up0.T  # [K, 36, 64]: image 1 still at half resolution
        # [K, 64, 100]: the 8x8 pixels of image 1, then the ring around them, which counts in the sum over image 1 only.
        similarity = (half.transpose(1, 2) * (1 / 64)) @ self.up1_inner_first.T  # 64: all channels, as in the original
        conf = torch.softmax(similarity[..., :64], 1) * torch.softmax(similarity, 2)[..., :64]
        pixel0, pixel1 = quotient(conf.flatten(1).argmax(1), 64)

        found = self.up0.index_select(0, pixel0)[:, None] @ last0  # [K, 1, 8]
        line = (found @ last1.transpose(1, 2)).flatten(1)
        correlation = line @ self.up1.T * (1 / (8**0.5 * 10))  # the original divides by sqrt(8), then by 10
        shift = torch.softmax(correlation.gather(1, self.wrapped.index_select(0, pixel1)), 1) @ self.steps
        return self.place.index_select(0, pixel0), self.place.index_select(0, pixel1) + shift


def _upsampling() -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear weights from 6x6 half-resolution pixels: [64, 36] for 8x8 pixels, [100, 36] for 10x10, and the latter
    with the 64 inner pixels before the ring."""
    axis = axis_weights(6, 2)[1:11]  # the window begins with the ring's second pixel
    inner = axis[1:9]
    up0, up1 = torch.kron(inner, inner), torch.kron(axis, axis)
    grid = torch.arange(100).reshape(10, 10)
    is_inner = torch.zeros(10, 10, dtype=torch.bool)
    is_inner[1:9, 1:9] = True
    return up0, up1, up1[torch.cat([grid[is_inner], grid[~is_inner]])]


def _two_convs(channels: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(),
        nn.Conv2d(channels, channels_out, 3, padding=1, bias=False),
    )
