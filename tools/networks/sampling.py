"""Reading maps at real-valued positions: bilinear sampling and deformable convolution.

Coordinates and grids stay in fp32 whatever the precision of the features (an fp16 grid is off by 0.2 px at 864 px),
and so do the features that are sampled: GridSample takes no mixed types, and ONNX Runtime's CUDA kernel only fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor, nn


def pixel_grid(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Pixel coordinates (x, y) of a map, [height, width, 2] float32, pixel centres at integers."""
    y = torch.arange(height, device=device, dtype=torch.float32)
    x = torch.arange(width, device=device, dtype=torch.float32)
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)


def size_xy(image: Tensor) -> Tensor:
    """(width, height) of [..., H, W] as a float32 tensor [2] that follows dynamic sizes."""
    return torch.stack((scalar(image.shape[-1], image.device), scalar(image.shape[-2], image.device)))


def sample(features: Tensor, positions: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Bilinear samples, zero outside the map.

    Args:
        features: [B, C, H, W].
        positions: [B, P, Q, 2] pixels (x, y), centres at integers.
        offsets: are added to `positions`, which are cheaper as constants of their own.

    Returns:
        [B, C, P, Q], in the type of `features`.
    """
    # align_corners=False maps pixel x to (2x + 1) / W - 1, which also works for maps of one pixel.
    size = size_xy(features)
    grid = positions.float() * (2 / size) + (1 / size - 1)
    if offsets is not None:
        grid = offsets * (2 / size) + grid
    sampled = F.grid_sample(features.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.to(features.dtype)


def read(maps: list[Tensor], pixels: Tensor) -> list[Tensor]:
    """Maps [B, C, H, W] of one size at whole pixels (x, y) [B, ..., 2] inside (float32) -> [B, ..., C] of each."""
    x, y = pixels.split(1, dim=-1)
    return [rows.reshape(*pixels.shape[:-1], rows.shape[1]) for rows in read_rows(maps, x, y)]


def read_rows(maps: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """The same with x and y [B, ...], which are broadcast to P pixels of each image -> rows [B P, C] of each map.

    As rows of the maps in channels-last order, in which convolutions leave them on a GPU.
    """
    batch, _, height, width = maps[0].shape
    image = torch.arange(batch, dtype=torch.float32, device=x.device).reshape(-1, *[1] * (y.dim() - 1))
    index = y * width + image * (height * width) + x  # exact: float32 holds whole numbers up to 2^24
    index = index.flatten().to(torch.int64)
    return [each.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, index) for each in maps]


class DeformableConv3x3(nn.Module):
    """Deformable 3x3 convolution without modulation (Dai et al. 2017): sampling at nine taps, then a convolution.

    Equal to torchvision.ops.deform_conv2d with stride 1 and padding 1 up to rounding. Keys: offset_conv.{weight,bias},
    regular_conv.weight. Set `as_operator` to export it as DeformConv, for ONNX Runtime on a CPU and for fp16 on a GPU;
    TensorRT's parser has no such operator and takes the body below, which is slower in ONNX Runtime.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.as_operator = False
        self.offset_conv = nn.Conv2d(in_channels, 18, 3, padding=1)
        self.regular_conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out_channels, H, W]."""
        batch, channels, height, width = x.shape
        limit = max(height, width) / 4
        weight, bias = self.offset_conv.weight, self.offset_conv.bias
        if self.as_operator and torch.onnx.is_in_onnx_export():
            return self._operator(x, self.offset_conv(x).float().clamp(-limit, limit).to(x.dtype))
        # Published as (y, x) of each tap, row by row; GridSample wants (x, y), last: no copy in channels-last order.
        assert bias is not None
        weight, bias = (values.unflatten(0, (9, 2)).flip(1).flatten(0, 1) for values in (weight, bias))
        offsets = F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1).float().clamp(-limit, limit)
        taps = pixel_grid(3, 3, x.device).reshape(9, 2) - 1
        still = (pixel_grid(height, width, x.device).unsqueeze(2) + taps).reshape(1, height, width * 9, 2)
        # One GridSample over a map nine times as wide, instead of nine; the nine taps of a pixel are neighbours in it.
        sampled = sample(x, still, offsets.reshape(batch, height, width * 9, 2))
        # As a product: cuDNN 9.19 in fp16 computes a convolution of kernel and stride (1, 9) with bias wrongly.
        columns = sampled.permute(0, 2, 3, 1).reshape(batch * height * width, 9 * channels)
        weight = self.regular_conv.weight.permute(2, 3, 1, 0).reshape(9 * channels, -1)
        y = columns @ weight if self.regular_conv.bias is None else torch.addmm(self.regular_conv.bias, columns, weight)
        return y.reshape(batch, height, width, -1).permute(0, 3, 1, 2)

    def _operator(self, x: Tensor, offsets: Tensor) -> Tensor:
        weight, bias = self.regular_conv.weight, self.regular_conv.bias
        result = torch.onnx.ops.symbolic(
            "DeformConv",
            (x, weight, offsets) if bias is None else (x, weight, offsets, bias),
            {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
            dtype=x.dtype,
            shape=(x.shape[0], weight.shape[0], *x.shape[2:]),
        )
        assert isinstance(result, Tensor)
        return result


@script(Opset("ai.onnx", 20), default_opset=op)
def DeformConv(x, weight, offsets, bias, kernel_shape: Sequence[int], pads: Sequence[int]):  # type: ignore[no-untyped-def]
    height, width = op.Shape(x, start=2, end=3), op.Shape(x, start=3, end=4)
    rows = op.Cast(op.Range(op.Constant(value_int=0), op.Squeeze(height), op.Constant(value_int=1)), to=1)
    columns = op.Cast(op.Range(op.Constant(value_int=0), op.Squeeze(width), op.Constant(value_int=1)), to=1)
    taps = op.Reshape(op.Constant(value_floats=[-1.0, 0.0, 1.0]), op.Constant(value_ints=[-1, 1]))
    each = op.Constant(value_ints=[0, 3, 3, 2])  # row and column of the tap; y, x
    moved = op.Reshape(op.Cast(offsets, to=1), op.Concat(each, height, width, axis=0))
    y = op.Unsqueeze(op.Add(rows, taps), op.Constant(value_ints=[1, 3]))
    x_ = op.Unsqueeze(op.Add(columns, taps), op.Constant(value_ints=[1]))
    y = op.Add(op.Gather(moved, op.Constant(value_int=0), axis=3), y)
    x_ = op.Add(op.Gather(moved, op.Constant(value_int=1), axis=3), x_)
    half = op.Constant(value_float=0.5)
    y = op.Div(op.Add(y, half), op.Mul(op.Cast(height, to=1), half))
    x_ = op.Div(op.Add(x_, half), op.Mul(op.Cast(width, to=1), half))
    last = op.Constant(value_ints=[-1])
    grid = op.Sub(op.Concat(op.Unsqueeze(x_, last), op.Unsqueeze(y, last), axis=-1), op.Constant(value_float=1.0))
    grid = op.Reshape(grid, op.Concat(op.Constant(value_ints=[0, -1]), width, op.Constant(value_ints=[2]), axis=0))
    matrix = op.Flatten(weight, axis=1)
    wide = op.Concat(op.Shape(x, end=1), op.Shape(matrix, start=1), last, axis=0)
    sampled = op.Reshape(op.CastLike(op.GridSample(op.Cast(x, to=1), grid, mode="linear"), x), wide)
    result = op.Add(op.MatMul(matrix, sampled), op.Unsqueeze(bias, last))
    return op.Reshape(result, op.Concat(op.Constant(value_ints=[0, 0]), height, width, axis=0))


def scalar(size: int, device: torch.device) -> Tensor:
    """A size as a float32 tensor [] that follows dynamic sizes."""
    return torch.full((), size, dtype=torch.float32, device=device)
