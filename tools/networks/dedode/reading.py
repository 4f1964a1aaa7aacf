"""Reading maps of several strides, each upsampled bilinearly to the next finer one and so to the image, at few pixels.

Upsampling is linear: what a pixel of the image gets of a coarse map are few of its pixels with weights of their own,
which depend on the column and the row alone. So nothing is upsampled: tables give these pixels and weights.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from matchanything_tools.networks.sampling import scalar


def read_upsampled(maps: dict[int, Tensor], pixels: Tensor, image: tuple[int, int]) -> list[Tensor]:
    """Maps [B, C, H / stride, W / stride] by stride, finest first, at pixels (x, y) [B, K, 2] (float32, whole) of an
    image (height, width): what upsampling from one stride to the one before, and last to the image, gives there,
    [B, K, C] of each."""
    batch, count = pixels.shape[:2]
    strides = [1, *maps]
    down, across = (
        tables(strides, [image[axis], *(x.shape[axis + 2] for x in maps.values())], pixels.device) for axis in (0, 1)
    )
    x, y = (place.flatten().to(torch.int64) for place in pixels.unbind(2))
    rows = torch.cat([part for table in down for part in table], dim=1).index_select(0, y)
    columns = torch.cat([part for table in across for part in table], dim=1).index_select(0, x)
    sizes = [part.shape[1] for table in down for part in table]
    parts = list(zip(rows.split(sizes, dim=1), columns.split(sizes, dim=1), strict=True))
    number = torch.arange(batch, dtype=torch.float32, device=pixels.device).repeat_interleave(count).unsqueeze(1)
    found = []
    for values, (row, column), (weight0, weight1) in zip(maps.values(), parts[::2], parts[1::2], strict=True):
        height, width = (scalar(side, pixels.device) for side in values.shape[2:])
        first = (row + number * height) * width  # exact: float32 holds whole numbers up to 2^24
        index = (first.unsqueeze(2) + column.unsqueeze(1)).flatten().to(torch.int64)
        taps = values.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, index)
        weight = (weight0.unsqueeze(2) * weight1.unsqueeze(1)).reshape(batch * count, 1, -1).to(values.dtype)
        found.append((weight @ taps.reshape(batch * count, weight.shape[2], -1)).reshape(batch, count, -1))
    return found


def read_beside(maps: list[Tensor], pixels: Tensor) -> list[Tensor]:
    """Maps [1, B C, H, W] that hold B images side by side as channels, each at its own whole pixels (x, y) [B, K, 2]
    -> [B, K, C] of each."""
    batch, count = pixels.shape[:2]
    image = torch.arange(batch, dtype=torch.float32, device=pixels.device).reshape(-1, 1, 1)
    x, y = pixels.split(1, dim=2)
    index = ((y * maps[0].shape[3] + x) * batch + image).flatten().to(torch.int64)
    rows = [each.permute(0, 2, 3, 1).reshape(-1, each.shape[1] // batch).index_select(0, index) for each in maps]
    return [values.reshape(batch, count, -1) for values in rows]


def tables(strides: list[int], sizes: list[int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Along one axis, for all strides but the first: the pixels of that map that a pixel of the first one reads, and
    their weights, [sizes[0], T] float32 each. Pixel edges aligned, held inside."""
    place = torch.arange(sizes[0], dtype=torch.float32, device=device).unsqueeze(1)
    weight, count = torch.ones_like(place), 1
    found = []
    for (fine, coarse), (size, other) in zip(
        pairwise(strides), pairwise(scalar(s, device) for s in sizes), strict=True
    ):
        position = torch.minimum(((place + 0.5) * (other / size) - 0.5).clamp(min=0), other - 1)
        first = position.floor()
        part = position - first
        place = torch.cat((first, first + 1), dim=1)
        weight = torch.cat((weight * (1 - part), weight * part), dim=1)
        # The same pixel may be there several times: one window of neighbours holds them all.
        count = math.ceil((count - 1) * fine / coarse) + 2
        window = place[:, :1] + torch.arange(count, dtype=torch.float32, device=device)
        weight = (weight.unsqueeze(2) * (place.unsqueeze(2) == window.unsqueeze(1)).float()).sum(dim=1)
        place = torch.minimum(window, other - 1)  # beyond the last pixel the weight is 0
        found.append((place, weight))
    return found
