"""The coarse transformer of EfficientLoFTR (Wang et al., CVPR 2024, section 3.2): aggregated attention.

Queries are 4x4 blocks of the coarse map summed by a depthwise convolution, keys and values its 4x4 maxima; the message
comes back to every cell by bilinear upsampling. Here a map is kept as [16, T, B, C], the cells of a block first: then
both kinds of pooling are plain reductions over the first axis, and upsampling is one matrix product.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from matchanything_tools.networks.attention import attention

WIDTH, HEADS, BLOCK = 256, 8, 4


class Grid(NamedTuple):
    """What attention needs to know of a coarse map with rows x columns blocks.

    turn_query, turn_key: [T, 1, 2 C] and [T, 1, 3 C], the rotary position encoding as factors of what the projections
    give: cosines for queries or keys, sines for the same with channels swapped, ones for values.
    upsampling: [16 T, T padded to a multiple of 8], or None to interpolate.
    """

    rows: int
    columns: int
    turn_query: Tensor
    turn_key: Tensor
    upsampling: Tensor | None


class AggregatedAttention(nn.Module):
    """One layer; attribute names are the published keys. Only what `fuse` made of them is used by `forward`."""

    pooling: Tensor
    ones: Tensor
    to_query: Tensor
    to_key_value: Tensor
    from_cell: Tensor
    from_message: Tensor
    to_cell: Tensor

    def __init__(self, rotary: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.aggregate = nn.Conv2d(WIDTH, WIDTH, BLOCK, BLOCK, groups=WIDTH, bias=False)
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.merge = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * WIDTH, 2 * WIDTH, bias=False), nn.LeakyReLU(), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        )
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)

    def fuse(self) -> None:
        """Fold what is linear: the rotation's swap of channels into the projections; `merge` and upsampling commute,
        so that `merge` joins the half of the MLP that reads the message."""
        query, key = self.q_proj.weight.double(), self.k_proj.weight.double()
        value = self.v_proj.weight.double()
        first, second = (self.mlp.get_parameter(f"{index}.weight").double() for index in (0, 2))
        queries = [query, _rotated(query)] if self.rotary else [query]
        keys = [key, _rotated(key)] if self.rotary else [key]
        weights = {
            "pooling": self.aggregate.weight.double().reshape(WIDTH, BLOCK * BLOCK).T.reshape(-1, 1, 1, WIDTH),
            "ones": torch.ones(1, BLOCK * BLOCK),
            "to_query": torch.cat(queries).T,
            "to_key_value": torch.cat([*keys, value]).T,
            "from_cell": first[:, :WIDTH].T,
            "from_message": (first[:, WIDTH:] @ self.merge.weight.double()).T,
            "to_cell": second.T,
        }
        for name in ("aggregate", "q_proj", "k_proj", "v_proj", "merge", "mlp"):
            delattr(self, name)
        for name, weight in weights.items():
            self.register_buffer(name, weight.detach().float().contiguous())

    def forward(self, x: Tensor, source: Tensor, grid: Grid, source_grid: Grid) -> Tensor:
        """x [16, T, B, C] attends to source [16, S, B, C]; returns the new x."""
        # A product with ones sums over the first axis in the type that is there: for sum() and amax() of fp16 the
        # exporter inserts casts to fp32 and back.
        pooled = (self.ones @ (x * self.pooling).flatten(1)).reshape(x.shape[1:])
        queries = self.norm1(pooled) @ self.to_query
        keys_values = self.norm1(_block_maximum(source)) @ self.to_key_value
        if self.rotary:
            query, turned = (queries * grid.turn_query).split(WIDTH, -1)
            key, turned_key, value = (keys_values * source_grid.turn_key).split(WIDTH, -1)
            query, key = query + turned, key + turned_key
        else:
            query = queries
            key, value = keys_values.split(WIDTH, -1)
        message = _swapped(attention(_swapped(query), _swapped(key), _swapped(value), HEADS))
        hidden = F.leaky_relu(x @ self.from_cell + _upsample(message, self.from_message, grid))
        return x + self.norm2(hidden @ self.to_cell)


class CoarseTransformer(nn.Module):
    """Self and cross attention, four times in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AggregatedAttention(rotary=index % 2 == 0) for index in range(8))

    def fuse(self) -> None:
        for layer in self.layers:
            layer.fuse()  # type: ignore[operator]

    def forward(self, x0: Tensor, x1: Tensor, grid0: Grid, grid1: Grid, together: bool) -> tuple[Tensor, Tensor]:
        """Feature blocks [16, T, 1, C] of both images -> the same. together: both have one size, so that self attention
        may run on both at once."""
        for index, layer in enumerate(self.layers):
            if index % 2:  # image 1 attends to image 0 as already updated
                x0 = layer(x0, x1, grid0, grid1)
                x1 = layer(x1, x0, grid1, grid0)
            elif together:
                both = torch.cat([x0, x1], 2)
                x0, x1 = layer(both, both, grid0, grid0).split(1, 2)
            else:
                x0, x1 = layer(x0, x0, grid0, grid0), layer(x1, x1, grid1, grid1)
        return x0, x1


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
    angles = angles[..., None].expand(*shape, 2, 2).reshape(rows * columns, 1, WIDTH)
    cos, sin = angles.cos().half().to(like.dtype), angles.sin().half().to(like.dtype)
    return Grid(rows, columns, torch.cat([cos, sin], 2), torch.cat([cos, sin, torch.ones_like(cos)], 2), None)


def to_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """Map [B, C, 4 rows, 4 columns] -> [16, rows * columns, B, C]."""
    x = x.reshape(x.shape[0], x.shape[1], rows, BLOCK, columns, BLOCK).permute(3, 5, 2, 4, 0, 1)
    return x.reshape(BLOCK * BLOCK, rows * columns, x.shape[4], x.shape[5])


def from_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of to_blocks."""
    batch, channels = x.shape[2], x.shape[3]
    x = x.reshape(BLOCK, BLOCK, rows, columns, batch, channels).permute(4, 5, 2, 0, 3, 1)
    return x.reshape(batch, channels, BLOCK * rows, BLOCK * columns)


def _swapped(x: Tensor) -> Tensor:
    """[T, B, C] -> [B, T, C] or back; without a copy where one image is alone."""
    return x.reshape(x.shape[1], x.shape[0], x.shape[2]) if 1 in x.shape[:2] else x.transpose(0, 1)


def _block_maximum(x: Tensor) -> Tensor:
    """[16, T, B, C] -> [T, B, C], as a pooling of channels-last layout, for which GPUs have faster kernels."""
    _, tokens, batch, width = x.shape
    image = x.reshape(1, BLOCK * BLOCK, tokens, batch * width).permute(0, 3, 1, 2)
    return F.max_pool2d(image, (BLOCK * BLOCK, 1)).permute(0, 2, 3, 1).reshape(tokens, batch, width)


def _upsample(message: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """[T, B, C] on blocks -> times weight [C, D], bilinear (align_corners=False) -> [16, T, B, D] on cells."""
    tokens, batch, _ = message.shape
    width = weight.shape[1]
    if grid.upsampling is not None:
        # Rows of 8 fp16 numbers are what tensor cores read at once.
        padded = grid.upsampling.shape[1]
        if padded != tokens:
            message = F.pad(message, (0, 0, 0, 0, 0, padded - tokens))
        cells = grid.upsampling @ (message @ weight).reshape(padded, batch * width)
        return cells.reshape(BLOCK * BLOCK, tokens, batch, width)
    coarse = (message @ weight).reshape(grid.rows, grid.columns, batch, width).permute(2, 3, 0, 1)
    fine = F.interpolate(coarse, scale_factor=float(BLOCK), mode="bilinear", align_corners=False)
    return to_blocks(fine, grid.rows, grid.columns)


def linear_weights(count: int) -> Tensor:
    """[4, count, count]: weight of block k for cell (position in its block, block) under linear interpolation."""
    position = (torch.arange(BLOCK * count) + 0.5) / BLOCK - 0.5
    position = position.clamp(0, count - 1)
    weights = (1 - (position[:, None] - torch.arange(count)).abs()).clamp(min=0)
    return weights.reshape(count, BLOCK, count).transpose(0, 1)


def _rotated(weight: Tensor) -> Tensor:
    """Rows (a, b) of every pair of channels -> (-b, a): the part of a rotation that the sine multiplies."""
    pairs = weight.reshape(-1, 2, weight.shape[1])
    return torch.stack([-pairs[:, 1], pairs[:, 0]], 1).reshape(weight.shape)
