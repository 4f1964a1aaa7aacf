"""Local correlation: a feature of one image against a window of the other, around where the flow points.

The offsets of the window are whole cells, so all samples of a window share one bilinear fraction: correlate at the
(2r+2)^2 whole cells around it, then blend those numbers, instead of sampling (2r+1)^2 feature vectors. The numbers are
picked from the products of all pairs of cells, which serve both directions: rows for the one, columns for the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch

BAND_BYTES = 480 << 20  # the products of all pairs are made for bands of rows of image 0, of at most this size each


def local_correlation(features: Iterable[torch.Tensor], flow: torch.Tensor, radius: int) -> torch.Tensor:
    """x . y(flow + offset) for offsets -radius..radius in both directions, offsets row by row.

    features: [.., H, W, C] of image 0 and of image 1; flow: normalised targets [2, 2, H, W] (x, y), float32: element 0
    leads from image 0 to image 1. Outside the map y is zero. Returns [2, H, W, (2 radius + 1)^2] as type of features.
    """
    height, width = flow.shape[2:]
    left, right = (x.reshape(height * width, -1) for x in features)
    cells, inside, fraction = _window(flow, radius)
    dots = _dots(left, right, cells, height, width).float()
    dots = dots * (inside[:, 1, :, :, None] * inside[:, 0, :, None, :])
    fraction_x, fraction_y = fraction[:, 0, :, None], fraction[:, 1, :, None]
    dots = dots[:, :, :-1] + fraction_y[..., None] * (dots[:, :, 1:] - dots[:, :, :-1])
    dots = dots[..., :-1] + fraction_x[..., None] * (dots[..., 1:] - dots[..., :-1])
    return dots.to(left.dtype).reshape(2, height, width, -1)


def _window(flow: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each axis (x, y): cells [2, 2, HW, 2r+2] within the map, 1 where inside, fractions [2, 2, HW]; float32."""
    height, width = flow.shape[2:]
    half = torch.tensor([width / 2, height / 2]).view(1, 2, 1)
    position = flow.flatten(2) * half + (half - 0.5)
    first = torch.floor(position)
    cells = first[..., None] + torch.arange(-radius, radius + 2, dtype=torch.float32)
    within = torch.minimum(cells.clamp(min=0.0), (2 * half - 1)[..., None])
    return within, (within == cells).float(), position - first


def _dots(left: torch.Tensor, right: torch.Tensor, cells: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Products of every cell with those of its window in the other image: [2, HW, 2r+2, 2r+2] (rows, columns)."""
    count = height * width
    stride = -(-count // 8) * 8  # matrix units want it
    if stride > count:
        right = torch.cat((right, right.new_zeros(stride - count, right.shape[1])))
    x, y = (axis.squeeze(1) for axis in cells.split(1, 1))
    column = x.to(torch.int32)[:, :, None, :]
    row0, row1 = y[0], y[1]
    edges = _bands(height, width * stride * left.element_size())
    own = [torch.arange(0, (end - start) * width * stride, stride, dtype=torch.int32) for start, end in pairwise(edges)]
    target0 = (row0.to(torch.int32) * width)[..., None] + column[0]  # cell of image 1 for each of image 0
    target0 = target0 + torch.cat(own)[:, None, None]  # among the products of its band
    target1 = column[1] * stride + torch.arange(count, dtype=torch.int32)[:, None, None]
    forward: list[torch.Tensor] = []
    backward: torch.Tensor | None = None
    after: torch.Tensor | None = None
    for start, end in pairwise(edges):
        rows = left[start * width : end * width]
        if after is not None:
            rows = rows + after  # an exact zero, known only when the band before is done: TensorRT would keep them all
        products = (rows @ right.T).flatten()
        index0 = target0[start * width : end * width]
        # Direction 1: what of its windows lies in this band. The row of the matrix is the cell of image 0.
        local = row1 - start
        row = local.clamp(0, end - start - 1)
        index1 = (row.to(torch.int32) * (width * stride))[..., None] + target1
        # One gather for both: with two, a runtime may make all bands for the first before it frees any for the second.
        numbers = _pick(products, torch.cat((index0, index1)).flatten())
        # Of one tensor, and overlapping: ONNX Runtime would make the two parts one Split, four times slower on a GPU.
        after = numbers[:1].clamp(0.0, 0.0)
        picked0, picked1 = numbers[: index0.numel()].view(index0.shape), numbers[index0.numel() :].view(index1.shape)
        forward.append(picked0)
        # Each of its windows' rows lies in one band: what the first one wrote elsewhere is overwritten.
        backward = picked1 if backward is None else torch.where((row == local)[..., None], picked1, backward)
    assert backward is not None
    return torch.stack((torch.cat(forward), backward))


def _pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values[index] of [N] and int32 [M], which index_select exports as int64: twice the memory to write and read."""
    if torch.onnx.is_in_onnx_export():
        result = torch.onnx.ops.symbolic("Gather", (values, index), {"axis": 0}, dtype=values.dtype, shape=index.shape)
        assert isinstance(result, torch.Tensor)
        return result
    return values.index_select(0, index)


def _bands(rows: int, row_bytes: int) -> list[int]:
    """Edges of bands of rows, of equal height where a division without rest is near."""
    least = -(-rows * row_bytes // BAND_BYTES)
    even = next((count for count in range(least, min(2 * least, rows) + 1) if rows % count == 0), least)
    return [rows * i // even for i in range(even + 1)]
