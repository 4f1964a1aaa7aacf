"""EfficientLoFTR as MatchAnything trained it: the published parameters, and the network of fixed shapes for export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import coarse, fine
from .backbone import RepVGG
from .transformer import CoarseTransformer, Grid, from_blocks, linear_weights, make_grid, to_blocks

CELL = 8  # pixels of a cell of the coarse map
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
        for part in (published.backbone, published.loftr_coarse, published.fine_preprocess):
            part.fuse()
        self.max_matches, self.size, self.square, self.position_scale = max_matches, size, square, position_scale
        self.dtype = torch.float16 if half else torch.float32
        self.backbone = published.backbone.to(self.dtype)
        self.transformer = published.loftr_coarse.to(self.dtype)
        self.pyramid = published.fine_preprocess.to(self.dtype)
        self.refinement = fine.Refinement()
        self.fixed = (
            None
            if size is None
            else _FixedGrid(make_grid(*self._blocks(*size), position_scale, torch.empty(0, dtype=self.dtype)))
        )
        self.requires_grad_(False)

    def forward(self, image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size0, size1 = self._cells(image0), self._cells(image1)
        together = self.fixed is not None
        if self.fixed is not None:
            half, quarter, eighth = self._features(torch.cat([image0, image1]))
            map0, map1 = eighth.split(1)
            grid0 = grid1 = self.fixed()
            pyramids = [(quarter, half)]
        else:
            half0, quarter0, map0 = self._features(image0)
            half1, quarter1, map1 = self._features(image1)
            grid0, grid1 = (
                make_grid(*self._blocks(*image.shape[2:]), self.position_scale, map0) for image in (image0, image1)
            )
            pyramids = [(quarter0, half0), (quarter1, half1)]
        map0, map1 = self._transform(map0, map1, grid0, grid1, together)

        conf = coarse.confidence(map0.flatten(2)[0], map1.flatten(2)[0])
        scores, cells0, cells1 = coarse.best_pairs(conf, size0, size1, self.max_matches)

        maps = [torch.cat([map0, map1])] if together else [map0, map1]
        features = [self._pyramid(*args) for args in zip(maps, *zip(*pyramids, strict=True), strict=True)]
        features0, features1 = features[0].split(1) if together else features
        offset0, offset1 = self.refinement(
            fine.windows(features0, cells0, size0[1]), fine.windows(features1, cells1, size1[1])
        )
        return _corner(cells0, size0[1]) + offset0, _corner(cells1, size1[1]) + offset1, scores

    def _features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backbone features at 1/2, 1/4 (these two with a margin of padding) and 1/8 (the valid part)."""
        height, width = image.shape[2:]
        image = image.to(self.dtype)
        if not self.square:
            return self.backbone(image)
        side = max(height, width)
        below, right = (min(side - length, PADDING_SEEN) for length in (height, width))
        half, quarter, eighth = self.backbone(F.pad(image, (0, right, 0, below)))
        rows, columns = (min(length // CELL + PYRAMID_MARGIN, side // CELL) for length in (height, width))
        return (
            half[:, :, : 4 * rows, : 4 * columns],
            quarter[:, :, : 2 * rows, : 2 * columns],
            eighth[:, :, : height // CELL, : width // CELL],
        )

    def _transform(self, map0: Tensor, map1: Tensor, grid0: Grid, grid1: Grid, together: bool) -> tuple[Tensor, Tensor]:
        x0, x1 = to_blocks(map0, grid0.rows, grid0.columns), to_blocks(map1, grid1.rows, grid1.columns)
        x0, x1 = self.transformer(x0, x1, grid0, grid1, together)
        return from_blocks(x0, grid0.rows, grid0.columns), from_blocks(x1, grid1.rows, grid1.columns)

    def _pyramid(self, coarse_map: Tensor, quarter: Tensor, half: Tensor) -> Tensor:
        if self.square:  # the transformer's output is zero in the padding
            below = quarter.shape[2] // 2 - coarse_map.shape[2]
            right = quarter.shape[3] // 2 - coarse_map.shape[3]
            coarse_map = F.pad(coarse_map, (0, right, 0, below))
        return self.pyramid(coarse_map, quarter, half)

    def _cells(self, image: Tensor) -> tuple[int, int]:
        return image.shape[2] // STEP * (STEP // CELL), image.shape[3] // STEP * (STEP // CELL)

    @staticmethod
    def _blocks(height: int, width: int) -> tuple[int, int]:
        return height // STEP, width // STEP


class _FixedGrid(nn.Module):
    """The grid of a fixed size, its tables stored and its upsampling as one matrix."""

    turn_query: Tensor
    turn_key: Tensor
    down: Tensor
    across: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.rows, self.columns = grid.rows, grid.columns
        tables = {
            "turn_query": grid.turn_query,
            "turn_key": grid.turn_key,
            "down": linear_weights(grid.rows),
            "across": linear_weights(grid.columns),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self) -> Grid:
        # The product of the two axes is left to the graph, in fp32: runtimes fold it then, and a file need not hold it.
        matrix = self.down[:, None, :, None, :, None] * self.across[None, :, None, :, None, :]
        matrix = matrix.reshape(16 * self.rows * self.columns, self.rows * self.columns)
        matrix = F.pad(matrix, (0, -matrix.shape[1] % 8)).to(self.turn_query.dtype)
        return Grid(self.rows, self.columns, self.turn_query, self.turn_key, matrix)


def _corner(cells: Tensor, columns: int) -> Tensor:
    """Cell indices [K] -> (x, y) of the cells' first pixels, float32 [K, 2]."""
    row, column = coarse.quotient(cells, columns)
    return torch.stack([column, row], 1).float() * CELL
