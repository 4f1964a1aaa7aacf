"""ELoFTR's transformer and refinement against their definition, written out as the original computes them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from test_eloftr import published

from matchanything_tools.networks.eloftr import fine, grid
from matchanything_tools.networks.eloftr.transformer import AggregatedAttention


def angles(rows: int, columns: int) -> torch.Tensor:
    """Of the position encoding, [rows, columns, 128] float64: places count from 1, rows and columns take turns."""
    frequencies = 10000 ** (-torch.arange(64).double() / 64)
    row, column = (torch.arange(1, count + 1)[:, None] * frequencies for count in (rows, columns))
    shape = (rows, columns, 64)
    return torch.stack([row[:, None].expand(shape), column.expand(shape)], 3).flatten(2)


def test_position_tables_are_rounded_to_half_precision() -> None:
    """As the original's: within half a step of fp16 below 1, and a little of fp32."""
    places = grid.make_grid(5, 7, 1.0, torch.empty(0))
    for table, exact in ((places.cos, angles(5, 7).cos()), (places.sin, angles(5, 7).sin())):
        assert table.dtype == torch.float32 and torch.equal(table, table.half().float())
        assert (table - exact.flatten(0, 1)).abs().max() < 2**-12 + 1e-6


def turned(x: torch.Tensor) -> torch.Tensor:
    """x [rows, columns, 256] with its positions."""
    turn = angles(*x.shape[:2])
    turn = torch.complex(turn.cos().half().double(), turn.sin().half().double())
    return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (128, 2))) * turn).flatten(2)


def attended(layer: AggregatedAttention, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """One layer as published, on maps [256, H, W]."""
    query = layer.norm1(layer.aggregate(x).permute(1, 2, 0))
    kept = layer.norm1(F.max_pool2d(source, 4).permute(1, 2, 0))
    q, k, v = layer.q_proj(query), layer.k_proj(kept), layer.v_proj(kept)
    if layer.rotary:
        q, k = turned(q), turned(k)
    q, k, v = (part.reshape(-1, 8, 32).transpose(0, 1) for part in (q, k, v))
    message = torch.softmax(q @ k.transpose(1, 2) / 32**0.5, 2) @ v
    message = layer.merge(message.transpose(0, 1).reshape(query.shape)).permute(2, 0, 1)
    message = F.interpolate(message[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    return x + layer.norm2(layer.mlp(torch.cat([x, message]).permute(1, 2, 0))).permute(2, 0, 1)


def test_transformer_with_images_of_two_sizes() -> None:
    """As many blocks in one as in the other, so that nothing but the result tells whose places were used."""
    transformer = published().loftr_coarse.eval()
    sizes = ((2, 4), (4, 2))  # in blocks
    generator = torch.Generator().manual_seed(7)
    maps = [torch.randn(256, 4 * rows, 4 * columns, generator=generator) for rows, columns in sizes]
    with torch.inference_mode():
        layers = copy.deepcopy(transformer).double().layers
        x0, x1 = (x.double() for x in maps)
        for own, cross in zip(layers[::2], layers[1::2], strict=True):
            x0, x1 = attended(own, x0, x0), attended(own, x1, x1)
            x0 = attended(cross, x0, x1)
            x1 = attended(cross, x1, x0)  # which is updated already
        transformer.fuse()
        blocks = [grid.to_blocks(x[None], *size) for x, size in zip(maps, sizes, strict=True)]
        results = transformer(*blocks, *(grid.make_grid(*size, 1.0, torch.empty(0)) for size in sizes))
    for result, exact, size in zip(results, (x0, x1), sizes, strict=True):
        # Eight layers of fp32 err by 2e-6; with the places of the other image it is 0.07.
        assert (grid.from_blocks(result, *size)[0] - exact).abs().max() < 1e-4


def refined(window0: torch.Tensor, window1: torch.Tensor) -> tuple[list[float], list[float]]:
    """Two windows [36, 64] at half resolution -> (x, y) in both images."""
    doubled = [
        F.interpolate(x.T.reshape(1, 64, 6, 6).double(), scale_factor=2, mode="bilinear", align_corners=False)[0]
        for x in (window0, window1)
    ]
    inner, ringed = doubled[0][:, 2:10, 2:10], doubled[1][:, 1:11, 1:11]  # [64, 8, 8] and [64, 10, 10]
    similarity = torch.einsum("cyx,cvu->yxvu", inner[:56], ringed[:56]) / 64
    over0 = torch.softmax(similarity.reshape(64, 100), 0).reshape(8, 8, 10, 10)
    over1 = torch.softmax(similarity.reshape(64, 100), 1).reshape(8, 8, 10, 10)
    best = int((over0 * over1)[:, :, 1:9, 1:9].argmax())
    y0, x0, y1, x1 = (best // step % 8 for step in (512, 64, 8, 1))
    # The ring is not counted in the place of the 3x3 window, which wraps around: so it was trained.
    rows, columns = ([(at + step) % 10 for step in (-1, 0, 1)] for at in (y1, x1))
    line = torch.einsum("c,cvu->vu", inner[56:, y0, x0], ringed[56:]) / 8**0.5 / 10
    weight = torch.softmax(line[rows][:, columns].flatten(), 0).reshape(3, 3)
    step = torch.arange(-1, 2)
    dx, dy = float((weight.sum(0) * step).sum()), float((weight.sum(1) * step).sum())
    return [x0 - 3.5, y0 - 3.5], [x1 - 3.5 + dx, y1 - 3.5 + dy]


def test_refinement_is_its_definition() -> None:
    windows = 4 * torch.randn(2, 60, 36, 64, generator=torch.Generator().manual_seed(8))
    offset0, offset1 = fine.Refinement()(*windows)
    wanted0, wanted1 = (torch.tensor(x) for x in zip(*map(refined, *windows), strict=True))
    assert torch.equal(offset0, wanted0)
    assert torch.allclose(offset1, wanted1, atol=1e-4)
