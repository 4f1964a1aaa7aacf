"""Convolutions of few channels in the form for which GPUs have fast fp16 kernels: columns become channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StripedConv(nn.Conv2d):
    """A convolution that keeps the size, or divides it by its stride, over stripes of neighbouring columns.

    The same sums, plus zeros: C channels of some columns are so many times C channels of one, which matrix units take
    64 at a time. In channels-last memory a map is its own map of stripes, so that nothing is moved but images that
    come as planes. On an H200, two maps of 480x640, 3x3 from 16 to 16 channels: 32 us instead of 62.
    """

    def __init__(self, conv: nn.Module, columns: int, *, planes: bool = False) -> None:
        """conv: it reaches no further than the next stripe. columns: of a stripe; a multiple of the stride that divides
        the width.
        planes: the input comes in channels-first memory."""
        assert isinstance(conv, nn.Conv2d) and conv.groups == 1 and columns % conv.stride[0] == 0
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        # Colours get a fourth, empty plane: 32 channels are a third faster than 24 (measured with 864 x 864 pixels).
        colours = planes and conv.in_channels == 3
        # Fewer than 8 channels need not be filled up: there are kernels for them.
        filled = columns * conv.in_channels > 8
        across, surplus = columns // stride, columns if colours else filled * (-columns * conv.in_channels % 8)
        inputs, outputs = columns * conv.in_channels + surplus, across * conv.out_channels
        above, before = (int(padding) for padding in conv.padding)
        beside = int(kernel > stride or before > 0)  # a stripe on either side
        size = (kernel, 2 * beside + 1)
        super().__init__(inputs, outputs, size, (stride, 1), (above, beside), bias=conv.bias is not None)
        self.columns, self.planes, self.across, self.surplus = columns, planes, across, surplus
        self.colours = colours
        weights = []
        for column in range(0, columns, stride):
            left = beside * columns + column - before
            wide = F.pad(conv.weight.detach(), (left, (2 * beside + 1) * columns - kernel - left))
            wide = wide.unflatten(3, (2 * beside + 1, columns))  # [outputs, inputs, rows, stripes, columns]
            wide = wide.permute(0, 1, 4, 2, 3) if planes else wide.permute(0, 4, 1, 2, 3)
            weights.append(F.pad(wide.flatten(1, 2), (0, 0, 0, 0, 0, surplus)))
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        if conv.bias is not None:
            self.bias = nn.Parameter(conv.bias.detach().repeat(across), requires_grad=False)

    def forward(self, x: Tensor, below: int = 0, right: int = 0) -> Tensor:
        """[B, I, H, W], below and on the right padded with zeros to [B, I, H', W'] -> [B, O, H' / s, W' / s]."""
        batch, channels, height, width = x.shape
        count = width // self.columns
        if self.colours:
            x = torch.cat((x, torch.zeros_like(x[:, :1])), 1)
        if self.planes and channels > 1:
            x = x.reshape(batch, -1, height, count, self.columns).permute(0, 2, 3, 1, 4).flatten(3)
        elif self.planes:
            x = x.reshape(batch, height, count, self.columns)
        else:
            x = x.permute(0, 2, 3, 1).reshape(batch, height, count, -1)
        if self.surplus and not self.colours:
            x = F.pad(x, (0, self.surplus))
        return self.of_stripes(x, below, right)

    def of_stripes(self, x: Tensor, below: int = 0, right: int = 0) -> Tensor:
        """The same of stripes, [B, H, stripes, channels]."""
        x = x.permute(0, 3, 1, 2)
        if below or right:
            x = F.pad(x, (0, right // self.columns, 0, below))
        x = super().forward(x).permute(0, 2, 3, 1)
        return x.reshape(x.shape[0], x.shape[1], x.shape[2] * self.across, -1).permute(0, 3, 1, 2)


class PairedConv(nn.Conv2d):
    """A 3x3 convolution that keeps the size; two neighbouring columns of its result are twice as many channels of one.

    The kernel is four columns wide, and each of the two ignores one of them. Worth it for up to 64 channels, which
    alone leave matrix units idle: on an H200, two maps of 120x160, from 96 to 64 channels: 18.6 us instead of 22.0.
    """

    def __init__(self, conv: nn.Module) -> None:
        assert isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1)
        super().__init__(conv.in_channels, 2 * conv.out_channels, (3, 4), (1, 2), 1, bias=conv.bias is not None)
        weight = conv.weight.detach()
        self.weight = nn.Parameter(torch.cat((F.pad(weight, (0, 1)), F.pad(weight, (1, 0)))), requires_grad=False)
        if conv.bias is not None:
            self.bias = nn.Parameter(conv.bias.detach().repeat(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, O, H, W]; W is even."""
        pairs = super().forward(x).permute(0, 2, 3, 1)
        return pairs.reshape(*pairs.shape[:2], 2 * pairs.shape[2], -1).permute(0, 3, 1, 2)


def striped(conv: nn.Module, width: int, *, planes: bool = False) -> nn.Conv2d:
    """`conv` over stripes of 64 channels, images over stripes of up to 8 columns, that divide `width`."""
    assert isinstance(conv, nn.Conv2d)
    most = 8 if planes else max(64 // conv.in_channels, 1)
    columns = math.gcd(most, width)
    return conv if columns == 1 else StripedConv(conv, columns, planes=planes)


def striped_average(channels: int, size: int) -> StripedConv:
    """Average pooling of size x size pixels as a convolution, over stripes of 64 channels or of `size` columns: 17 us
    instead of 25 for 16 channels of two maps of 480x640 on an H200."""
    conv = nn.Conv2d(channels, channels, size, size, bias=False)
    conv.weight = nn.Parameter((torch.eye(channels) / size**2)[:, :, None, None].expand(-1, -1, size, size))
    return StripedConv(conv, max(64 // channels, size))
