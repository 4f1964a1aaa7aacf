"""ALIKED's convolutional part: image -> score map and feature map (Zhao et al. 2023, "ALIKED: A Lighter Keypoint and
Descriptor Extraction Network via Deformable Transformation")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from matchanything_tools.networks.aliked.features import upsample
from matchanything_tools.networks.aliked.padding import DIVISOR, PaddingConv
from matchanything_tools.networks.sampling import DeformableConv3x3
from matchanything_tools.networks.stripes import striped, striped_average
from matchanything_tools.networks.upsampling import upsampled_sum


@dataclass(frozen=True)
class Variant:
    """Channels of the four resolutions, descriptor length, and sampling positions per descriptor."""

    channels: tuple[int, int, int, int]
    dim: int
    positions: int


VARIANTS = {
    "t16": Variant((8, 16, 32, 64), 64, 16),
    "n16": Variant((16, 32, 64, 128), 128, 16),
    "n16rot": Variant((16, 32, 64, 128), 128, 16),  # n16 trained with rotations
    "n32": Variant((16, 32, 64, 128), 128, 32),
}


class Block(nn.Module):
    """Two 3x3 convolutions, each with batch norm and SELU; from the second block on with a residual connection."""

    def __init__(self, in_channels: int, channels: int, *, residual: bool, deformable: bool) -> None:
        super().__init__()

        def conv(inputs: int) -> nn.Module:
            if deformable:
                return DeformableConv3x3(inputs, channels)
            return nn.Conv2d(inputs, channels, 3, padding=1, bias=False)

        self.conv1, self.bn1 = conv(in_channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels), nn.BatchNorm2d(channels)
        self.downsample = nn.Conv2d(in_channels, channels, 1) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, channels, H, W]."""
        y = self.bn2(self.conv2(F.selu(self.bn1(self.conv1(x)))))
        return F.selu(y if self.downsample is None else y + self.downsample(x))

    def fuse(self) -> None:
        """Fold the batch norms into the convolutions before them."""
        for conv, name in ((self.conv1, "bn1"), (self.conv2, "bn2")):
            plain = conv.regular_conv if isinstance(conv, DeformableConv3x3) else conv
            fused = fuse_conv_bn_eval(plain, getattr(self, name))
            plain.weight, plain.bias = fused.weight, fused.bias
            setattr(self, name, nn.Identity())


class Backbone(nn.Module):
    """Image -> score map and features."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        c1, c2, c3, c4 = variant.channels
        quarter = variant.dim // 4
        self.block1 = Block(3, c1, residual=False, deformable=False)
        self.block2 = Block(c1, c2, residual=True, deformable=False)
        self.block3 = Block(c2, c3, residual=True, deformable=True)
        self.block4 = Block(c3, c4, residual=True, deformable=True)
        self.pool2: nn.Module = nn.AvgPool2d(2)
        self.pool3: nn.Module = nn.AvgPool2d(4)
        self.pool4: nn.Module = nn.AvgPool2d(4)
        self.conv1 = nn.Conv2d(c1, quarter, 1, bias=False)
        self.conv2 = nn.Conv2d(c2, quarter, 1, bias=False)
        self.conv3 = nn.Conv2d(c3, quarter, 1, bias=False)
        self.conv4 = nn.Conv2d(c4, quarter, 1, bias=False)
        self.score_head = nn.Sequential(
            nn.Conv2d(variant.dim, 8, 1, bias=False),
            nn.SELU(),
            nn.Conv2d(8, 4, 3, padding=1, bias=False),
            nn.SELU(),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.SELU(),
            nn.Conv2d(4, 1, 3, padding=1, bias=False),
        )
        self.reduce = nn.ModuleList()  # the first layer of the score head for each of the four groups: see fuse

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image [B, 3, H, W] in [0, 1], H and W multiples of 32 -> logits of the score map [B, 1, H, W], and four
        groups of channels of the features (see features.py), [B, dim / 4, H / s, W / s] with s = 1, 2, 8, 32."""
        x1 = self.block1(image)
        x2 = self.block2(self.pool2(x1))
        x3 = self.block3(self.pool3(x2))
        x4 = self.block4(self.pool4(x3))
        groups = [
            F.selu(self.conv1(x1)),
            F.selu(self.conv2(x2)),
            F.selu(self.conv3(x3)),
            F.selu(self.conv4(x4)),
        ]
        return self._score_logits(groups), groups

    def fuse(self) -> None:
        """Fold every batch norm into a convolution; afterwards the keys are no longer those of the checkpoint."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            block.fuse()
        # The first layer is linear and so is upsampling: reducing to 8 channels first, at the low resolutions, is the
        # same and saves most of the work.
        for weight in self.score_head[0].weight.chunk(4, dim=1):
            reduce = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
            reduce.weight = nn.Parameter(weight, requires_grad=False)
            self.reduce.append(reduce)

    def stripe(self) -> None:
        """Run the convolutions of high resolution over stripes (see stripes.py), for fp16; call `fuse` before."""
        c1, c2, c3 = (conv.in_channels for conv in (self.conv1, self.conv2, self.conv3))
        self.pool2, self.pool3, self.pool4 = striped_average(c1, 2), striped_average(c2, 4), striped_average(c3, 4)
        width, half = DIVISOR, DIVISOR // 2  # or a multiple
        first, second = self.block1, self.block2
        first.conv1, first.conv2 = PaddingConv(first.conv1, 8, planes=True), striped(first.conv2, width)
        second.conv1, second.conv2 = striped(second.conv1, half), striped(second.conv2, half)
        self.conv1, self.reduce[0] = striped(self.conv1, width), striped(self.reduce[0], width)
        for layer in (2, 4, 6):
            self.score_head[layer] = striped(self.score_head[layer], width)

    def _score_logits(self, groups: list[Tensor]) -> Tensor:
        size = groups[0].shape[2:]
        x, *low = (reduce(group) for reduce, group in zip(self.reduce, groups, strict=True))
        if x.dtype == torch.float16 and isinstance(size[0], int) and isinstance(size[1], int):
            x = x + upsampled_sum(low, (size[0], size[1]), align_corners=True)
        else:
            for y in low:
                x = x + upsample(y, size)
        return self.score_head[1:](x)
