"""What depends on nothing but the size of both images, where that is fixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .coarse import CELL, Cells, make_cells
from .grid import BLOCK, Grid, block_weights, make_grid
from .upsampling import Double


class Fixed(nn.Module):
    """Tables and constant matrices."""

    cos: Tensor
    sin: Tensor
    down: Tensor
    across: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        padded: tuple[bool, bool],
        margins: tuple[int, int],
        position_scale: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.rows, self.columns = (length // (CELL * BLOCK) for length in size)
        height, width = (length // CELL for length in size)
        grid = make_grid(self.rows, self.columns, position_scale, torch.empty(0, dtype=dtype))
        tables = {
            "cos": grid.cos,
            "sin": grid.sin,
            "down": block_weights(self.rows),
            "across": block_weights(self.columns),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.double_blocks = Double(height, width, padded, margins).to(dtype)
        self.double_map = Double(2 * (height + margins[0]), 2 * (width + margins[1])).to(dtype)
        self.stride = 4 * (width + margins[1])  # pixels in a line of the fine features
        for image in (0, 1):  # the fine features of both are one table
            first = image * self.stride * 4 * (height + margins[0])
            for name, table in make_cells(height, width, self.stride, first, torch.device("cpu"))._asdict().items():
                self.register_buffer(f"{name}{image}", table, persistent=False)

    def forward(self) -> tuple[Grid, Cells, Cells]:
        # The product of the two axes is left to the graph: runtimes fold it then, and a file need not hold it. In fp32:
        # ONNX Runtime folds what it can compute on a CPU.
        matrix = self.down[:, None, :, None, None] * self.across[:, None, :, :, None]
        tokens = self.rows * self.columns
        upsampling = matrix.reshape(1, tokens, 16 * tokens).to(self.dtype)
        grid = Grid(self.rows, self.columns, self.cos, self.sin, upsampling)
        cells0, cells1 = (Cells(*(getattr(self, f"{name}{image}") for name in Cells._fields)) for image in (0, 1))
        return grid, cells0, cells1

    def to_half(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to twice the size."""
        return self.double_map(x.permute(0, 3, 2, 1))

    def to_quarter(self, blocks: Tensor) -> Tensor:
        """Blocks [B, T, 16, C] -> map [B, C, H, W] twice as large."""
        batch, channels = blocks.shape[0], blocks.shape[3]
        x = blocks.reshape(batch, self.rows, self.columns, 4, 4, channels).permute(0, 2, 3, 1, 4, 5)
        return self.double_blocks(x.reshape(batch, 4 * self.columns, 4 * self.rows, channels))
