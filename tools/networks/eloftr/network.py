"""EfficientLoFTR as MatchAnything trained it: the published parameters, and the network of fixed shapes for export."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import coarse, fine
from .backbone import RepVGG
from .coarse import CELL, Cells
from .fixed import Fixed
from .grid import BLOCK, from_blocks, make_grid, to_blocks
from .transformer import CoarseTransformer
from .upsampling import double

STEP = CELL * BLOCK  # input sides are multiples of this
# Rows of padding that can reach the last row of coarse features: 119 pixels of receptive field, in whole cells.
PADDING_SEEN = 120
# Rows of cells below the valid ones for which the pyramid is computed. None: cells at the border are not matched, and
# the receptive field of the other windows ends before the padding, but for the upsampling of the coarse features.
PYRAMID_MARGIN = 0


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
        self.fixed: Fixed | None = None
        if size is not None:
            padded = (square and size[0] < size[1], square and size[1] < size[0])
            self.fixed = Fixed(size, padded, self._margins(*size), position_scale, self.dtype)
        self.requires_grad_(False)

    def forward(self, image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = (
            self._separately(image0, image1)
            if self.fixed is None
            else self._together(torch.cat([image0, image1]), self.fixed)
        )
        cells = first.cells, second.cells
        factors = coarse.confidences(first.coarse, second.coarse, *(part.matched for part in cells))
        scores, *indices = coarse.best_pairs(*factors, *cells, self.max_matches)
        windows, corners = [], []
        for image, index in zip((first, second), indices, strict=True):
            pixel = image.cells.window.index_select(0, index)
            windows.append(fine.windows(image.fine, pixel, image.stride))
            corners.append(image.cells.corner.index_select(0, index))
        offset0, offset1 = self.refinement(*windows)
        return corners[0] + offset0, corners[1] + offset1, scores

    def _together(self, images: Tensor, fixed: Fixed) -> tuple[_Features, _Features]:
        """Two images [2, 1, H, W] of the fixed size."""
        half, quarter, eighth = self._features(images)
        grid, cells0, cells1 = fixed()
        both, *maps = self.transformer.together(to_blocks(eighth, grid.rows, grid.columns), grid)
        table = self.pyramid(both, quarter, half, fixed.to_quarter, fixed.to_half)
        map0, map1 = (part.reshape(-1, part.shape[3]) for part in maps)
        return _Features(map0, table, fixed.stride, cells0), _Features(map1, table, fixed.stride, cells1)

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
            result.append(_Features(x.reshape(-1, x.shape[3]), table, 16 * columns, cells))
        return result

    def _features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backbone features at 1/2, 1/4 (these two with padding) and 1/8 (the valid part)."""
        height, width = image.shape[2:]
        image = image.to(self.dtype)
        if not self.square:
            return self.backbone(image)
        side = max(height, width)
        below, right = (min(side - length, PADDING_SEEN) for length in (height, width))
        cut = (below < side - height, right < side - width)
        half, quarter, eighth = self.backbone(image, below, right, cut)
        return half, quarter, eighth if any(cut) else eighth[:, :, : height // CELL, : width // CELL]

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
