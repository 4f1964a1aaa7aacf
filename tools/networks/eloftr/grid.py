"""The coarse map of EfficientLoFTR as blocks of 4x4 cells, and what the transformer needs to know of their places."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .upsampling import axis_weights

WIDTH, BLOCK = 256, 4  # channels; cells along the side of a block


class Grid(NamedTuple):
    """What attention needs to know of a coarse map with rows x columns blocks.

    turn_query, turn_key: [T, 2 C] and [T, 3 C], the rotary position encoding as factors of what the projections
    give: cosines for queries or keys, sines for the same with channels swapped, ones for values.
    upsampling: [1, T, 16 T], transposed for `transposed_matmul`; or None to interpolate.
    """

    rows: int
    columns: int
    turn_query: Tensor
    turn_key: Tensor
    upsampling: Tensor | None


def make_grid(rows: int, columns: int, scale: float, like: Tensor) -> Grid:
    """rows, columns: of 4x4 blocks. scale: what positions are multiplied by.
    like: any tensor of the wanted type and device.

    The original rounds the tables of the position encoding to fp16; so do we.
    """
    frequencies = torch.exp(torch.arange(64, device=like.device) * (-math.log(10000.0) / 64))
    row = (torch.arange(rows, device=like.device) + 1.0)[:, None] * scale * frequencies
    column = (torch.arange(columns, device=like.device) + 1.0)[:, None] * scale * frequencies
    shape = (rows, columns, 64)
    # Channels 4k, 4k+1 turn with the row and 4k+2, 4k+3 with the column.
    angles = torch.stack([row[:, None].expand(shape), column[None].expand(shape)], -1)
    angles = angles[..., None].expand(*shape, 2, 2).reshape(rows * columns, WIDTH)
    cos, sin = angles.cos().half().to(like.dtype), angles.sin().half().to(like.dtype)
    return Grid(rows, columns, torch.cat([cos, sin], 1), torch.cat([cos, sin, torch.ones_like(cos)], 1), None)


def to_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """Map [B, C, 4 rows, 4 columns] -> [B, rows * columns, 16, C]."""
    x = x.reshape(x.shape[0], x.shape[1], rows, BLOCK, columns, BLOCK).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(x.shape[0], rows * columns, BLOCK * BLOCK, x.shape[5])


def from_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of to_blocks."""
    batch, channels = x.shape[0], x.shape[3]
    x = x.reshape(batch, rows, columns, BLOCK, BLOCK, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, channels, BLOCK * rows, BLOCK * columns)


def block_weights(count: int) -> Tensor:
    """[count, count, 4]: weight of a block for every cell (block, position in it) along one axis."""
    return axis_weights(count, BLOCK).T.reshape(count, count, BLOCK)
