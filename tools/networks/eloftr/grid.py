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

    cos, sin: [T, C / 2], the rotary position encoding, see `rotate`.
    upsampling: [1, T, 16 T], transposed for `transposed_matmul`; or None to interpolate.
    """

    rows: int
    columns: int
    cos: Tensor
    sin: Tensor
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
    angles = torch.stack([row[:, None].expand(shape), column[None].expand(shape)], -1).reshape(rows * columns, -1)
    cos, sin = (table.half().to(like.dtype) for table in (angles.cos(), angles.sin()))
    return Grid(rows, columns, cos, sin, None)


def to_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """Map [B, C, 4 rows, 4 columns] -> [B, rows * columns, 16, C], the cells of a block column by column.

    In this order both the way into blocks and the pyramid's out of them move vectors of at least C numbers.
    """
    x = x.reshape(x.shape[0], x.shape[1], rows, BLOCK, columns, BLOCK).permute(0, 2, 4, 5, 3, 1)
    return x.reshape(x.shape[0], rows * columns, BLOCK * BLOCK, x.shape[5])


def from_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of to_blocks."""
    batch, channels = x.shape[0], x.shape[3]
    x = x.reshape(batch, rows, columns, BLOCK, BLOCK, channels).permute(0, 5, 1, 4, 2, 3)
    return x.reshape(batch, channels, BLOCK * rows, BLOCK * columns)


def block_weights(count: int) -> Tensor:
    """[count, count, 4]: weight of a block for every cell (block, position in it) along one axis."""
    return axis_weights(count, BLOCK).T.reshape(count, count, BLOCK)
