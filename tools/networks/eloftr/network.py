"""EfficientLoFTR as MatchAnything trained it: the published parameters, and the network of fixed shapes for export."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import coarse, fine
from .backbone import RepVGG
from .coarse import CELL, Cells
from .transformer import CoarseTransformer, Grid, block_weights, from_blocks, make_grid, to_blocks
from .upsampling import Double, double

STEP = 32  # input sides are multiples of this: a cell times the 4x4 blocks of the transformer
# Rows of padding that can reach the last row of coarse features: 119 pixels of receptive field, in whole cells.
PADDING_SEEN = 120
# Coarse rows below the valid ones that can reach a fine window: the pyramid's receptive field, see test_eloftr.py.
PYRAMID_MARGIN = 4


class Published(nn.Module):
    """The 447 published keys, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = RepVGG()
        self.loftr_coarse = CoarseTransformer()
        self.fine_preprocess = fine.FeaturePyramid()


class EfficientLoFTR(nn.Module):
    """gray image0 [1, 1, H0, W0], image1 [1, 1, H1, W1] -> keypoints0 [K, 2], keypoints1 [K, 2], scores [K].

    Keypoints are (x, y) in input pixels, centres at integers; scores (coarse confidence) are best first, 0 is padding.

    published: its parameters are taken over and fused; do not use it afterwards.
    size: (height, width) of both images where it is fixed, else None (any multiples of 32).
    square: pad each image to a square with zeros right and below inside the network, as the demo does: the padding is
        seen by the convolutions only, and masked afterwards.
    position_scale: what positions are multiplied by before they are encoded: training side / side (1 in the demo).
    half: convolutions, attention and the pyramid in fp16; similarities, softmax and coordinates stay fp32.
    """

    def __init__(
        self,
        published: Published,
        max_matches: int,
        size: tuple[int, int] | None = None,
        square: bool = False,
        position_scale: float = 1.0,
        half: bool = False,
    ) -> None:
        super().__init__()
        published.eval()
        published.backbone.fuse(striped=half)
        published.loftr_coarse.fuse()
        published.fine_preprocess.fuse()
        self.max_matches, self.size, self.square, self.position_scale = max_matches, size, square, position_scale
        self.dtype = torch.float16 if half else torch.float32
        self.backbone = published.backbone.to(self.dtype)
        self.transformer = published.loftr_coarse.to(self.dtype)
        self.pyramid = published.fine_preprocess.to(self.dtype)
        self.refinement = fine.Refinement()
        self.fixed = None if size is None else _Fixed(size, self._margins(*size), position_scale, self.dtype)
        self.requires_grad_(False)

    def forward(self, image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = (
            self._separately(image0, image1)
            if self.fixed is None
            else self._together(torch.cat([image0, image1]), self.fixed)
        )
        over1, over0 = coarse.confidences(first.coarse, second.coarse)
        inside = first.cells.inside, second.cells.inside
        scores, *indices = coarse.best_pairs(over1, over0, *inside, self.max_matches)
        windows, corners = [], []
        for image, index in zip((first, second), indices, strict=True):
            pixel = image.cells.window.index_select(0, index)
            windows.append(fine.windows(image.fine, pixel, image.stride))
            corners.append(image.cells.corner.index_select(0, index))
        offset0, offset1 = self.refinement(*windows)
        return corners[0] + offset0, corners[1] + offset1, scores

    def _together(self, images: Tensor, fixed: _Fixed) -> tuple[_Features, _Features]:
        """Two images [2, 1, H, W] of the fixed size."""
        half, quarter, eighth = self._features(images)
        grid, cells0, cells1 = fixed()
        both = self.transformer.together(to_blocks(eighth, grid.rows, grid.columns), grid)
        table = self.pyramid(both, quarter, half, fixed.to_quarter, fixed.to_half)
        map0, map1 = (coarse.block_by_block(part) for part in both.split(1, 2))
        stride = half.shape[3]
        return _Features(map0, table, stride, cells0), _Features(map1, table, stride, cells1)

    def _separately(self, *images: Tensor) -> list[_Features]:
        """Two images [1, 1, H, W] of any sizes."""
        maps = [self._features(image) for image in images]
        grids = [make_grid(*self._blocks(*image.shape[2:]), self.position_scale, maps[0][2]) for image in images]
        blocks = [to_blocks(eighth, grid.rows, grid.columns) for (_, _, eighth), grid in zip(maps, grids, strict=True)]
        result = []
        for x, (half, quarter, _), grid in zip(self.transformer(*blocks, *grids), maps, grids, strict=True):
            rows, columns = grid.rows, grid.columns
            table = self.pyramid(x, quarter, half, partial(_double_blocks, rows=rows, columns=columns), double)
            cells = coarse.make_cells(4 * rows, 4 * columns, 16 * columns, 0, x.device)
            result.append(_Features(coarse.block_by_block(x), table, 16 * columns, cells))
        return result

    def _features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backbone features at 1/2, 1/4 (these two with a margin of padding) and 1/8 (the valid part)."""
        height, width = image.shape[2:]
        image = image.to(self.dtype)
        if not self.square:
            return self.backbone(image)
        side = max(height, width)
        below, right = (min(side - length, PADDING_SEEN) for length in (height, width))
        half, quarter, eighth = self.backbone(image, below, right)
        rows, columns = (
            length // CELL + margin
            for length, margin in zip((height, width), self._margins(height, width), strict=True)
        )
        return (
            half[:, :, : 4 * rows, : 4 * columns],
            quarter[:, :, : 2 * rows, : 2 * columns],
            eighth[:, :, : height // CELL, : width // CELL],
        )

    def _margins(self, height: int, width: int) -> tuple[int, int]:
        """Cells of padding below and on the right that the pyramid computes."""
        side = max(height, width) if self.square else 0
        below, right = (min(PYRAMID_MARGIN, max(side - length, 0) // CELL) for length in (height, width))
        return below, right

    @staticmethod
    def _blocks(height: int, width: int) -> tuple[int, int]:
        return height // STEP, width // STEP


class _Features(NamedTuple):
    """coarse [N, C]: a row for each of `cells`. fine: see FeaturePyramid; stride: pixels in one of its lines."""

    coarse: Tensor
    fine: Tensor
    stride: int
    cells: Cells


def _double_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    return double(from_blocks(x, rows, columns))


class _Fixed(nn.Module):
    """What depends on nothing but the size of both images: tables and constant matrices."""

    turn_query: Tensor
    turn_key: Tensor
    down: Tensor
    across: Tensor

    def __init__(
        self, size: tuple[int, int], margins: tuple[int, int], position_scale: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.rows, self.columns = (length // STEP for length in size)
        height, width = (length // CELL for length in size)
        grid = make_grid(self.rows, self.columns, position_scale, torch.empty(0, dtype=dtype))
        tables = {
            "turn_query": grid.turn_query,
            "turn_key": grid.turn_key,
            "down": block_weights(self.rows).to(dtype),
            "across": block_weights(self.columns).to(dtype),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.double_blocks = Double(height, width, *margins).to(dtype)
        self.double_map = Double(2 * (height + margins[0]), 2 * (width + margins[1])).to(dtype)
        stride = 4 * (width + margins[1])
        for image in (0, 1):  # the fine features of both are one table
            first = image * stride * 4 * (height + margins[0])
            for name, table in coarse.make_cells(height, width, stride, first, torch.device("cpu"))._asdict().items():
                self.register_buffer(f"{name}{image}", table, persistent=False)

    def forward(self) -> tuple[Grid, Cells, Cells]:
        # The product of the two axes is left to the graph: runtimes fold it then, and a file need not hold it.
        matrix = self.down[:, None, :, None, :, None] * self.across[None, :, None, :, None, :]
        tokens = self.rows * self.columns
        grid = Grid(self.rows, self.columns, self.turn_query, self.turn_key, matrix.reshape(tokens, 16 * tokens))
        cells0, cells1 = (Cells(*(getattr(self, f"{name}{image}") for name in Cells._fields)) for image in (0, 1))
        return grid, cells0, cells1

    def to_half(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to twice the size."""
        return self.double_map(x.permute(0, 3, 2, 1))

    def to_quarter(self, blocks: Tensor) -> Tensor:
        """Blocks [16, T, B, C] -> map [B, C, H, W] twice as large."""
        batch, channels = blocks.shape[2:]
        x = blocks.reshape(4, 4, self.rows, self.columns, batch, channels).permute(4, 3, 1, 2, 0, 5)
        return self.double_blocks(x.reshape(batch, 4 * self.columns, 4 * self.rows, channels))
