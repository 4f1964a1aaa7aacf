"""AggregatedAttention as it is exported: its projections multiplied out, for any sizes or, faster, for fixed ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.attention import attention, norm_by_rows
from matchanything_tools.networks.kestrel.blocks import AggregatedAttention, rotary_table
from matchanything_tools.networks.products import transposed_matmul
from matchanything_tools.networks.rotary import rotate, rotated

BLOCK = 4  # cells per side of what attention works on
Table = tuple[Tensor, Tensor]  # cosines and sines


class Grid(NamedTuple):
    """Constants for maps [B, H, W, C] whose size is known when the graph is made.

    upsampling [B, H W / 16, H W]: `enlarge` of [B, H W / 16, C] as one product with it, transposed. sums
    [B H / 4, W / 4, 4 W]: of each block of four rows. turns: cosines and sines [H W / 16, C / 2].
    """

    upsampling: Tensor
    sums: Tensor
    turns: Table

    @classmethod
    def of(cls, x: Tensor) -> Grid:
        batch, height, width, _ = x.shape
        cosine, sine = table(x)
        rows, columns = (
            interpolation(length // BLOCK, BLOCK, torch.empty(0, device=x.device)).T for length in (height, width)
        )
        upsampling = (rows[:, None, :, None] * columns[None, :, None, :]).reshape(1, -1, height * width)
        block = torch.arange(width, device=x.device).div(BLOCK, rounding_mode="floor").repeat(BLOCK)
        sums = block == torch.arange(width // BLOCK, device=x.device)[:, None]
        return cls(
            upsampling.to(x.dtype).expand(batch, -1, -1),
            sums.to(x.dtype).expand(batch * height // BLOCK, -1, -1),
            (cosine[:, ::2], sine[:, ::2]),
        )


class Attention(nn.Module):
    """The rotation's exchange of channels goes into the projections, and what follows the message before the first
    nonlinearity, enlargement aside, is one matrix."""

    pool: Tensor
    to_query: Tensor
    to_key_value: Tensor
    from_message: Tensor
    from_cell: Tensor
    to_cell: Tensor

    def __init__(self, layer: AggregatedAttention, turns: bool) -> None:
        super().__init__()
        self.heads = layer.heads
        self.norm_in, self.norm_out = layer.norm_in, layer.norm_out
        query = layer.query.weight.double()
        key, value = layer.key_value.weight.double().chunk(2)
        first, dim = layer.mlp_in.weight.double(), len(query)
        self.keep("pool", layer.pool)
        self.keep("from_cell", first[:, :dim].T)
        self.keep("from_message", (first[:, dim:] @ layer.out.weight.double()).T)
        self.keep("to_cell", layer.mlp_out.weight.T)
        self.keep_projections(query, key, value, turns)

    def keep(self, name: str, weight: Tensor) -> None:
        self.register_buffer(name, weight.detach().float().contiguous())

    def keep_projections(self, query: Tensor, key: Tensor, value: Tensor, turns: bool) -> None:
        self.keep("to_query", torch.cat((query, rotated(query))).T if turns else query.T)
        self.keep("to_key_value", torch.cat((key, rotated(key), value) if turns else (key, value)).T)

    def maxima(self, source: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H W / 16, C]: what keys and values are made of."""
        return _tiles(source).amax(4).amax(2).flatten(1, 2)

    def forward(self, x: Tensor, maxima: Tensor, table: Table | None = None, grid: Grid | None = None) -> Tensor:
        """x [B, H, W, C] attends to the image that `maxima` comes from; table: for self attention, see `table` or, for
        fixed sizes, Grid.turns."""
        height, width, dim = x.shape[1:]
        query = self.norm(self.pooled(x, grid), self.norm_in)
        query, key, value = self.projections(query, self.norm(maxima, self.norm_in), table)
        message = attention(query, key, value, self.heads) @ self.from_message
        message = self.enlarged(message, height, width, grid)
        # As one operator, which adds to what is there: a product and an addition take longer.
        hidden = torch.addmm(message.reshape(-1, 2 * dim), x.reshape(-1, dim), self.from_cell)
        hidden = F.leaky_relu(hidden).reshape(x.shape[0] * height, width, 2 * dim)
        return x + self.norm(hidden @ self.to_cell, self.norm_out).reshape(x.shape)

    def pooled(self, x: Tensor, grid: Grid | None) -> Tensor:
        """[B, H, W, C] -> [B, H W / 16, C]: what queries are made of."""
        return (_tiles(x) * self.pool).sum(4).sum(2).flatten(1, 2)

    def projections(self, query: Tensor, source: Tensor, table: Table | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised [B, N, C] of both sides -> query, key, value."""
        dim = query.shape[2]
        query, keys_values = query @ self.to_query, source @ self.to_key_value
        if table is None:
            key, value = keys_values.split(dim, -1)
            return query, key, value
        cosine, sine = table
        query, turned = (query * torch.cat((cosine, sine), 1)).split(dim, -1)
        factors = torch.cat((cosine, sine, torch.ones_like(cosine)), 1)
        key, turned_key, value = (keys_values * factors).split(dim, -1)
        return query + turned, key + turned_key, value

    def enlarged(self, message: Tensor, height: int, width: int, grid: Grid | None) -> Tensor:
        """[B, H W / 16, 2 C] -> [B, H, W, 2 C]"""
        return enlarge(message.reshape(len(message), height // BLOCK, width // BLOCK, -1), BLOCK)

    def norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        normed: Tensor = norm(x)
        return normed


class FixedAttention(Attention):
    """For sizes that are known when the graph is made: operators that GPUs prefer, for the rotation too, and larger
    constants."""

    to_key: Tensor
    to_value: Tensor

    def keep_projections(self, query: Tensor, key: Tensor, value: Tensor, turns: bool) -> None:
        # Each by itself: to take a product apart again takes longer than one more product.
        self.keep("to_query", query.T)
        self.keep("to_key", key.T)
        self.keep("to_value", value.T)

    def maxima(self, source: Tensor) -> Tensor:
        return F.max_pool2d(source.permute(0, 3, 1, 2), BLOCK).permute(0, 2, 3, 1).flatten(1, 2)

    def pooled(self, x: Tensor, grid: Grid | None) -> Tensor:
        # A depthwise convolution takes longer than products with the factors and with ones. Factors are repeated for
        # every cell, because repeating them on the fly doubles the time.
        assert grid is not None
        batch, height, width, dim = x.shape
        factors = self.pool.reshape(1, 1, BLOCK, 1, BLOCK, dim).expand(
            batch, height // BLOCK, -1, width // BLOCK, -1, -1
        )
        rows = (x * factors.reshape(x.shape)).reshape(-1, BLOCK * width, dim)
        return (grid.sums @ rows).reshape(batch, -1, dim)

    def projections(self, query: Tensor, source: Tensor, table: Table | None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = query @ self.to_query, source @ self.to_key, source @ self.to_value
        if table is not None:
            query, key = rotate(query, *table), rotate(key, *table)
        return query, key, value

    def enlarged(self, message: Tensor, height: int, width: int, grid: Grid | None) -> Tensor:
        assert grid is not None
        return transposed_matmul(grid.upsampling, message)

    def norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return norm_by_rows(x, norm)


def table(tokens: Tensor) -> Table:
    """For tokens [B, H, W, C]: [H W / 16, C]."""
    _, height, width, dim = tokens.shape
    cosine, sine = rotary_table(height // BLOCK, width // BLOCK, dim, 1.0, tokens)
    return cosine.to(tokens.dtype), sine.to(tokens.dtype)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """[B, H, W, C] -> [B, factor H, factor W, C], bilinear as F.interpolate(align_corners=False), as two products."""
    batch, height, width, channels = x.shape
    x = interpolation(width, factor, x) @ x
    x = interpolation(height, factor, x) @ x.reshape(batch, height, factor * width * channels)
    return x.reshape(batch, factor * height, factor * width, channels)


def interpolation(count: int, factor: int, like: Tensor) -> Tensor:
    """[factor * count, count]: weight of each sample for each of `factor` times as many; a runtime folds it."""
    position = (torch.arange(factor * count, device=like.device) + 0.5) / factor - 0.5
    weight = (1 - (position[:, None] - torch.arange(count, device=like.device)).abs()).clamp(min=0)
    return (weight / weight.sum(1, keepdim=True)).to(like.dtype)  # the outermost have one neighbour, which counts fully


def _tiles(x: Tensor) -> Tensor:
    batch, height, width, dim = x.shape
    return x.reshape(batch, height // BLOCK, BLOCK, width // BLOCK, BLOCK, dim)
