"""The layers Kestrel is made of: re-parameterised convolutions, bilinear upsampling, aggregated attention with RoPE.

Maps are [B, C, H, W] in the convolutions and [B, H, W, C] in the attention layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.eloftr.backbone import fold_batch_norm


class RepConv(nn.Module):
    """conv3x3 + BN beside an identity (or conv1x1 + BN), then ReLU; `fuse` folds all of it into one convolution.

    Re-parameterised as in RepVGG (Ding et al. 2021).
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.spatial = ConvBN(channels_in, channels_out, 3, 1, 1)
        self.pointwise = ConvBN(channels_in, channels_out, 1, 1, 0) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.spatial(x) + (x if self.pointwise is None else self.pointwise(x)))

    def fuse(self) -> nn.Module:
        """The same function of x as one convolution and a ReLU (in eval mode)."""
        weight, bias = self.spatial.folded()
        if self.pointwise is None:
            point = torch.eye(len(weight), dtype=weight.dtype)[:, :, None, None]
        else:
            point, point_bias = self.pointwise.folded()
            bias = bias + point_bias
        return _conv_relu(weight + F.pad(point, (1, 1, 1, 1)), bias, stride=1)


class Down(nn.Module):
    """conv4x4 + BN beside conv2x2 + BN, both of stride 2, then ReLU.

    Even kernels, because they lie symmetrically about the centre of the 2x2 pixels that an output stands for: with
    3x3 a feature sits half a pixel off, to the other side when the image is turned round, and matches follow it.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.wide = ConvBN(channels_in, channels_out, 4, 2, 1)
        self.narrow = ConvBN(channels_in, channels_out, 2, 2, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.wide(x) + self.narrow(x))

    def fuse(self) -> nn.Module:
        """The same function of x as one convolution and a ReLU (in eval mode)."""
        wide, bias_wide = self.wide.folded()
        narrow, bias_narrow = self.narrow.folded()
        return _conv_relu(wide + F.pad(narrow, (1, 1, 1, 1)), bias_wide + bias_narrow, stride=2)


class ConvBN(nn.Module):
    """A convolution without bias and its batch normalisation."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that does the same in eval mode (folded in double precision)."""
        weight, bias = fold_batch_norm(self.conv.weight, self.norm)
        return weight.detach(), bias.detach()


def _conv_relu(weight: Tensor, bias: Tensor, stride: int) -> nn.Module:
    channels_out, channels_in, kernel, _ = weight.shape
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, 1)
    conv.weight.data, conv.bias.data = weight.float(), bias.float()  # type: ignore[union-attr]
    return nn.Sequential(conv, nn.ReLU())


def fuse(module: nn.Module) -> nn.Module:
    """Replace, in place, every re-parameterised block in `module` by its single convolution; returns `module`."""
    for name, child in module.named_children():
        setattr(module, name, child.fuse() if isinstance(child, RepConv | Down) else fuse(child))
    return module


def upsample(x: Tensor, factor: int, axes: tuple[int, int]) -> Tensor:
    """Bilinear enlargement of the two axes (2, 3) or (1, 2) by an even factor, as F.interpolate(align_corners=False).

    Where gradients are wanted it is written as shifted sums: the backward pass of the library's kernel adds
    atomically, which is slow.
    """
    if not torch.is_grad_enabled():
        channels_last = axes == (1, 2)
        x = x.permute(0, 3, 1, 2) if channels_last else x
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        return x.permute(0, 2, 3, 1) if channels_last else x
    for axis in axes:
        size = x.shape[axis]
        before = torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, size - 1)), axis)
        after = torch.cat((x.narrow(axis, 1, size - 1), x.narrow(axis, size - 1, 1)), axis)
        phases = []
        for phase in range(factor):
            shift = (phase + 0.5) / factor - 0.5  # of the new pixel's centre from the old one's, in old pixels
            other = before if shift < 0 else after
            phases.append(x + (other - x) * abs(shift))
        x = torch.stack(phases, axis + 1).flatten(axis, axis + 1)
    return x


class AggregatedAttention(nn.Module):
    """One transformer layer whose queries, keys and values live on a 4x coarser grid (Efficient LoFTR, 2024).

    Queries are pooled by learned depthwise 4x4 weights, keys and values by their maximum; the message is enlarged
    again and merged with the map by a small MLP.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.pool = nn.Parameter(torch.full((4, 1, 4, dim), 1 / 16) + 0.01 * torch.randn(4, 1, 4, dim))
        self.norm_in = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_in = nn.Linear(2 * dim, 2 * dim, bias=False)
        self.mlp_out = nn.Linear(2 * dim, dim, bias=False)
        self.norm_out = nn.LayerNorm(dim)
        nn.init.constant_(self.norm_out.weight, 0.3)  # layers start close to the identity

    def forward(self, x: Tensor, source: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, H, W, C] attends to source [B, H', W', C]; sides are multiples of 4."""
        batch, height, width, dim = x.shape
        tiles = x.reshape(batch, height // 4, 4, width // 4, 4, dim)
        source = source.reshape(batch, source.shape[1] // 4, 4, source.shape[2] // 4, 4, dim)
        query = self.query(self.norm_in((tiles * self.pool).sum((2, 4)).flatten(1, 2)))
        key, value = self.key_value(self.norm_in(source.amax((2, 4)).flatten(1, 2))).chunk(2, -1)
        if rotary is not None:
            query, key = rotate(query, rotary).to(value.dtype), rotate(key, rotary).to(value.dtype)
        message = F.scaled_dot_product_attention(self._split(query), self._split(key), self._split(value))
        message = message.transpose(1, 2).reshape(batch, height // 4, width // 4, dim)
        message = upsample(self.out(message), 4, (1, 2))
        message = self.mlp_out(F.leaky_relu(self.mlp_in(torch.cat((x, message), -1))))
        return x + self.norm_out(message).to(x.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.heads, x.shape[2] // self.heads).transpose(1, 2)


def rotary_table(height: int, width: int, dim: int, scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [height * width, dim] of 2-D rotary position encoding; y and x take turns along dim.

    scale: stretches the positions; training draws it, so that larger images than the training's stay in range.
    """
    rate = torch.exp(torch.arange(dim // 4, device=like.device) * (-math.log(10000.0) / (dim // 4)))
    y = (torch.arange(height, device=like.device) + 1.0)[:, None, None] * scale * rate
    x = (torch.arange(width, device=like.device) + 1.0)[None, :, None] * scale * rate
    angle = torch.stack((y.expand(-1, width, -1), x.expand(height, -1, -1)), -1).reshape(height * width, dim // 2)
    angle = angle.repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply a rotary_table to x [B, N, dim]."""
    cosine, sine = rotary
    return x * cosine + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sine
