"""The convolutional refiners of RoMa: one for each stride, adding to flow and certainty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from matchanything_tools.networks.roma.correlation import local_correlation
from matchanything_tools.networks.roma.grids import pixel_grid

FEATURES = {16: 512, 8: 512, 4: 256, 2: 64, 1: 9}  # channels of the projected features by stride
EMBEDDING = {16: 128, 8: 64, 4: 32, 2: 16, 1: 6}  # channels of the embedded displacement
RADIUS = {16: 7, 8: 3, 4: 2}  # of the local correlation, where there is one
HIDDEN_BLOCKS = 8


class ConvRefiner(nn.Module):
    """Features x, y [B, C, H, W] and flow [B, 2, H, W] -> raw correction [B, 3, H, W]: flow (x, y) and certainty."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.radius = RADIUS.get(stride)
        self.inputs = 2 * FEATURES[stride] + EMBEDDING[stride]
        width = self.inputs + (0 if self.radius is None else (2 * self.radius + 1) ** 2)
        self.disp_emb = nn.Conv2d(2, EMBEDDING[stride], 1)
        self.block1 = _block(width)
        self.hidden_blocks = nn.Sequential(*(_block(width) for _ in range(HIDDEN_BLOCKS)))
        self.out_conv = nn.Conv2d(width, 3, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, flow: torch.Tensor, zoom: float) -> torch.Tensor:
        """zoom: size of this pass over the size of the first."""
        sampled = F.grid_sample(y.float(), flow.permute(0, 2, 3, 1), align_corners=False).to(x.dtype)
        displacement = (40 / 32 * zoom) * (flow - pixel_grid(*flow.shape[2:]))
        parts = [x, sampled, self.disp_emb(displacement.to(x.dtype))]
        if self.radius is not None:
            parts.append(local_correlation(x, y, flow, self.radius))
        hidden = self.hidden_blocks(self.block1(torch.cat(parts, 1)))
        return self.out_conv(hidden.float())

    @torch.no_grad()
    def bake(self) -> ConvRefiner:
        """Reshape it for export, when its batch norms are folded; no result changes.

        Channels that are always zero widen it to a multiple of 64 (of 8 where narrow): the published widths (1377,
        1137, 569) keep matrix units idle. They stand after the displacement's, whose convolution can make zeros.
        The depthwise convolutions lose their biases: with one, cuDNN has a kernel half as fast only.
        """
        width = self.out_conv.in_channels
        extra = -width % (64 if width > 256 else 8)
        for block in (self.block1, *self.hidden_blocks):
            depthwise, pointwise = block[0], block[3]
            weight, bias = (self._insert(x, 0, extra) for x in (depthwise.weight, depthwise.bias))
            block[0] = _conv(weight, None, width + extra)
            # relu(x + b) = max(x, -b) + b, and the following 1x1 convolution takes the b into its own bias.
            block[2] = _AtLeast(-bias)
            weight, own = (self._insert(x, 0, extra) for x in (pointwise.weight, pointwise.bias))
            weight = self._insert(weight, 1, extra)
            block[3] = _conv(weight, own + weight[:, :, 0, 0] @ bias)
        self.out_conv = _conv(self._insert(self.out_conv.weight, 1, extra), self.out_conv.bias)
        embedding = self.disp_emb
        assert embedding.bias is not None
        more = embedding.weight.new_zeros(extra, 2, 1, 1)
        self.disp_emb = _conv(torch.cat((embedding.weight, more)), F.pad(embedding.bias, (0, extra)))
        return self

    def _insert(self, tensor: torch.Tensor, axis: int, count: int) -> torch.Tensor:
        head, tail = tensor.tensor_split([self.inputs], axis)
        shape = list(tensor.shape)
        shape[axis] = count
        return torch.cat((head, tensor.new_zeros(shape), tail), axis)


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 5, padding=2, groups=width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
    )


class _AtLeast(nn.Module):
    """The larger of each value of [B, C, H, W] and its channel's bound [C]."""

    def __init__(self, bound: torch.Tensor) -> None:
        super().__init__()
        self.bound = nn.Parameter(bound.reshape(1, -1, 1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x, self.bound)


def _conv(weight: torch.Tensor, bias: torch.Tensor | None, groups: int = 1) -> nn.Conv2d:
    """A convolution of stride 1 that keeps the size, with these weights."""
    with torch.device("meta"):
        conv = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            weight.shape[2],
            padding=weight.shape[2] // 2,
            groups=groups,
            bias=bias is not None,
        )
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv
