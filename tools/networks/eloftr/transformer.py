"""The coarse transformer of EfficientLoFTR (Wang et al., CVPR 2024, section 3.2): aggregated attention.

Queries are 4x4 blocks of the coarse map summed by a depthwise convolution, keys and values its 4x4 maxima; the message
comes back to every cell by bilinear upsampling. Here a map is kept as [B, T, 16, C], a block's cells together: then
both poolings are of neighbours in memory, and upsampling is one matrix product. Two images of one size are B = 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from matchanything_tools.networks.attention import attention, norm_by_rows
from matchanything_tools.networks.products import transposed_matmul
from matchanything_tools.networks.rotary import rotate

from .grid import BLOCK, WIDTH, Grid, to_blocks

HEADS = 8


class AggregatedAttention(nn.Module):
    """One layer; attribute names are the published keys. Only what `fuse` made of them is used by `forward`."""

    pooling: Tensor
    to_query: Tensor
    to_key: Tensor
    to_value: Tensor
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
        """Fold what is linear: `merge` and upsampling commute, so that `merge` joins the half of the MLP that reads the
        message."""
        first, second = (self.mlp.get_parameter(f"{index}.weight").double() for index in (0, 2))
        weights = {
            "pooling": self.aggregate.weight.double().permute(3, 2, 0, 1).flatten(0, 1),
            "to_query": self.q_proj.weight.T,
            "to_key": self.k_proj.weight.T,
            "to_value": self.v_proj.weight.T,
            "from_cell": first[:, :WIDTH].T,
            "from_message": (first[:, WIDTH:] @ self.merge.weight.double()).T,
            "to_cell": second.T,
        }
        for name in ("aggregate", "q_proj", "k_proj", "v_proj", "merge", "mlp"):
            delattr(self, name)
        for name, weight in weights.items():
            self.register_buffer(name, weight.detach().float().contiguous())

    def forward(self, x: Tensor, source: Tensor, grid: Grid, source_grid: Grid) -> Tensor:
        """x [B, T, 16, C] attends to source [B, S, 16, C]; returns the new x."""
        return self.update(x, self.queries(x, grid), source, grid, source_grid)

    def queries(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, T, 16, C] -> [B, T, C]."""
        # The depthwise convolution as a dense product with a matrix that is mostly zeros: on an H200 at 480x640 9 us
        # instead of 14 for factors and a sum. Runtimes make the matrix once, but of fp16 they cannot: hence fp32 here.
        matrix = (self.pooling.float() * torch.eye(WIDTH, device=x.device)).flatten(0, 1).to(x.dtype)
        queries = _norm(x.flatten(2) @ matrix, self.norm1) @ self.to_query
        return rotate(queries, grid.cos, grid.sin) if self.rotary else queries

    def update(self, x: Tensor, query: Tensor, source: Tensor, grid: Grid, source_grid: Grid) -> Tensor:
        """x with the messages from source to its queries."""
        kept = _norm(_block_maximum(source), self.norm1)
        key, value = kept @ self.to_key, kept @ self.to_value
        if self.rotary:
            key = rotate(key, source_grid.cos, source_grid.sin)
        message = attention(query, key, value, HEADS) @ self.from_message
        cells = x.reshape(-1, WIDTH)
        hidden = F.leaky_relu(torch.addmm(_upsampled(message, grid), cells, self.from_cell))
        return x + _norm(hidden @ self.to_cell, self.norm2).reshape(x.shape)


class CoarseTransformer(nn.Module):
    """Self and cross attention, four times in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AggregatedAttention(rotary=index % 2 == 0) for index in range(8))

    def fuse(self) -> None:
        for layer in self.layers:
            layer.fuse()  # type: ignore[operator]

    def forward(self, x0: Tensor, x1: Tensor, grid0: Grid, grid1: Grid) -> tuple[Tensor, Tensor]:
        """Feature blocks [1, T, 16, C] of both images, which may differ in size -> the same."""
        for index, layer in enumerate(self.layers):
            if index % 2:  # image 1 attends to image 0 as already updated
                x0 = layer(x0, x1, grid0, grid1)
                x1 = layer(x1, x0, grid1, grid0)
            else:
                x0, x1 = layer(x0, x0, grid0, grid0), layer(x1, x1, grid1, grid1)
        return x0, x1

    def together(self, both: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """The same for two images of one size, [2, T, 16, C]: what does not differ between them is done at once.

        Returns both, and each alone.
        """
        for index in range(0, len(self.layers), 2):
            alone, across = self.layers[index], self.layers[index + 1]
            assert isinstance(across, AggregatedAttention)
            both = alone(both, both, grid, grid)
            query0, query1 = across.queries(both, grid).split(1)
            x0, x1 = both.split(1)
            x0 = across.update(x0, query0, x1, grid, grid)
            x1 = across.update(x1, query1, x0, grid, grid)
            both = torch.cat([x0, x1])
        return both, x0, x1


def _block_maximum(x: Tensor) -> Tensor:
    """[B, T, 16, C] -> [B, T, C], as a pooling of channels-last layout, for which GPUs have faster kernels."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), (1, BLOCK * BLOCK)).permute(0, 2, 3, 1).flatten(1, 2)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x) of [..., C]; every row a batch of its own, as `norm_by_rows` wants it."""
    return norm_by_rows(x.reshape(-1, 1, WIDTH), norm).reshape(x.shape)


def _upsampled(message: Tensor, grid: Grid) -> Tensor:
    """Message [B, T, D] on blocks, upsampled bilinearly (align_corners=False) to cells, [B * T * 16, D]."""
    batch, _, width = message.shape
    if grid.upsampling is not None:
        return transposed_matmul(grid.upsampling.expand(batch, -1, -1), message).reshape(-1, width)
    coarse = message.reshape(batch, grid.rows, grid.columns, width).permute(0, 3, 1, 2)
    fine = F.interpolate(coarse, scale_factor=float(BLOCK), mode="bilinear", align_corners=False)
    return to_blocks(fine, grid.rows, grid.columns).reshape(-1, width)
