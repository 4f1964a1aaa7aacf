"""The coarse transformer of EfficientLoFTR (Wang et al., CVPR 2024, section 3.2): aggregated attention.

Queries are 4x4 blocks of the coarse map summed by a depthwise convolution, keys and values its 4x4 maxima; the message
comes back to every cell by bilinear upsampling. Here a map is kept as [16, T, B, C], the cells of a block first: then
both kinds of pooling are plain reductions over the first axis, and upsampling is one matrix product. Two images of one
size are B = 2; to attention, which must not mix them, they are twice as many heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from matchanything_tools.networks.attention import attention, norm_by_rows
from matchanything_tools.networks.products import transposed_addmm

from .upsampling import axis_weights

WIDTH, HEADS, BLOCK = 256, 8, 4


class Grid(NamedTuple):
    """What attention needs to know of a coarse map with rows x columns blocks.

    turn_query, turn_key: [T, 1, 2 C] and [T, 1, 3 C], the rotary position encoding as factors of what the projections
    give: cosines for queries or keys, sines for the same with channels swapped, ones for values.
    upsampling: [T, 16 T], transposed for `transposed_addmm`; or None to interpolate.
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
        queries = [query, rotated(query)] if self.rotary else [query]
        keys = [key, rotated(key)] if self.rotary else [key]
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
        return self.update(x, self.queries(x, grid), source, grid, source_grid)

    def queries(self, x: Tensor, grid: Grid) -> Tensor:
        """[16, T, B, C] -> [T, B, C]."""
        # A product with ones sums over the first axis in the type that is there: for sum() and amax() of fp16 the
        # exporter inserts casts to fp32 and back.
        pooled = (self.ones @ (x * self.pooling).flatten(1)).reshape(x.shape[1:])
        queries = _norm(pooled, self.norm1) @ self.to_query
        if not self.rotary:
            return queries
        query, turned = (queries * grid.turn_query).split(WIDTH, -1)
        return query + turned

    def update(self, x: Tensor, query: Tensor, source: Tensor, grid: Grid, source_grid: Grid) -> Tensor:
        """x with the messages from source to its queries."""
        keys_values = _norm(_block_maximum(source), self.norm1) @ self.to_key_value
        if self.rotary:
            key, turned, value = (keys_values * source_grid.turn_key).split(WIDTH, -1)
            key = key + turned
        else:
            key, value = keys_values.split(WIDTH, -1)
        flat_query, key, value = (part.flatten(1)[None] for part in (query, key, value))
        message = attention(flat_query, key, value, x.shape[2] * HEADS)
        message = message.reshape(query.shape) @ self.from_message
        hidden = F.leaky_relu(_add_upsampled(x @ self.from_cell, message, grid))
        return x + _norm(hidden @ self.to_cell, self.norm2)


class CoarseTransformer(nn.Module):
    """Self and cross attention, four times in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AggregatedAttention(rotary=index % 2 == 0) for index in range(8))

    def fuse(self) -> None:
        for layer in self.layers:
            layer.fuse()  # type: ignore[operator]

    def forward(self, x0: Tensor, x1: Tensor, grid0: Grid, grid1: Grid) -> tuple[Tensor, Tensor]:
        """Feature blocks [16, T, 1, C] of both images, which may differ in size -> the same."""
        for index, layer in enumerate(self.layers):
            if index % 2:  # image 1 attends to image 0 as already updated
                x0 = layer(x0, x1, grid0, grid1)
                x1 = layer(x1, x0, grid1, grid0)
            else:
                x0, x1 = layer(x0, x0, grid0, grid0), layer(x1, x1, grid1, grid1)
        return x0, x1

    def together(self, both: Tensor, grid: Grid) -> Tensor:
        """The same for two images of one size, [16, T, 2, C]: what does not differ between them is done at once."""
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, AggregatedAttention)
            if index % 2:
                query0, query1 = layer.queries(both, grid).split(1, 1)
                x0, x1 = both.split(1, 2)
                x0 = layer.update(x0, query0, x1, grid, grid)
                both = torch.cat([x0, layer.update(x1, query1, x0, grid, grid)], 2)
            else:
                both = layer(both, both, grid, grid)
        return both


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


def _block_maximum(x: Tensor) -> Tensor:
    """[16, T, B, C] -> [T, B, C], as a pooling of channels-last layout, for which GPUs have faster kernels."""
    _, tokens, batch, width = x.shape
    image = x.reshape(1, BLOCK * BLOCK, tokens, batch * width).permute(0, 3, 1, 2)
    return F.max_pool2d(image, (BLOCK * BLOCK, 1)).permute(0, 2, 3, 1).reshape(tokens, batch, width)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x) of [..., C]; every row a batch of its own, so that but one row of zeros is added."""
    return norm_by_rows(x.reshape(-1, 1, WIDTH), norm).reshape(x.shape)


def _add_upsampled(x: Tensor, message: Tensor, grid: Grid) -> Tensor:
    """x [16, T, B, D] on cells plus message [T, B, D] on blocks, upsampled bilinearly (align_corners=False)."""
    _, tokens, batch, width = x.shape
    if grid.upsampling is not None:
        cells = transposed_addmm(x.reshape(-1, batch * width), grid.upsampling, message.reshape(tokens, batch * width))
        return cells.reshape(x.shape)
    coarse = message.reshape(grid.rows, grid.columns, batch, width).permute(2, 3, 0, 1)
    fine = F.interpolate(coarse, scale_factor=float(BLOCK), mode="bilinear", align_corners=False)
    return x + to_blocks(fine, grid.rows, grid.columns)


def block_weights(count: int) -> Tensor:
    """[count, 4, count]: weight of a block for every cell (position in its block, block) along one axis."""
    return axis_weights(count, BLOCK).reshape(count, BLOCK, count).permute(2, 1, 0)


def rotated(weight: Tensor) -> Tensor:
    """Rows (a, b) of every pair of channels -> (-b, a): the part of a rotation that the sine multiplies."""
    pairs = weight.reshape(-1, 2, weight.shape[1])
    return torch.stack([-pairs[:, 1], pairs[:, 0]], 1).reshape(weight.shape)
