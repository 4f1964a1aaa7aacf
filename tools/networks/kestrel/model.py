"""Kestrel: a small semi-dense matcher across modalities. Trainable form; matching.py turns it into a matcher.

The plan is that of LoFTR (Sun et al. 2021) and Efficient LoFTR (Wang et al. 2024): a convolutional pyramid, attention
between the two images at 1/8, cell matches there. Its own: a matchability per cell, a window stage whose queries
start as copies of the keys, and a last stage that compares patches resampled with the local affine map.

Coordinates are pixels of the input, centres at integers; cell (row, column) of the 1/8 map has its centre at
8 * index + 3.5, pixel k of the 1/2 map at 2 * k + 0.5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from matchanything_tools.networks.kestrel.blocks import AggregatedAttention, Down, RepConv, rotary_table, upsample
from matchanything_tools.networks.kestrel.refine import PatchRefiner, WindowRefiner

CELL = 8  # input pixels per cell
SHARPNESS = 10.0  # inverse temperature of the dual softmax


class Features(NamedTuple):
    """What the network knows about a batch of images."""

    descriptors: Tensor  # [B, h, w, 192] at 1/8
    matchable: Tensor  # [B, h, w] logits: is the point of the cell visible in the other image?
    keys: Tensor  # [B, H/2, W/2, 64] for the window stage
    queries: Tensor  # [B, h, w, 64] for the window stage
    detail: Tensor  # [B, 32, H/2, W/2] for the patch stage


class Kestrel(nn.Module):
    """The network; `features` of both images at once, then `window` and `patch` for the cells to be refined."""

    def __init__(self, widths: tuple[int, int, int] = (32, 96, 192), layers: int = 4, fine: int = 64) -> None:
        super().__init__()
        half, quarter, dim = widths
        self.dim = dim
        self.stage1 = nn.Sequential(Down(1, half), RepConv(half, half))
        self.stage2 = nn.Sequential(Down(half, quarter), *(RepConv(quarter, quarter) for _ in range(3)))
        self.stage3 = nn.Sequential(Down(quarter, dim), *(RepConv(dim, dim) for _ in range(6)))
        self.self_layers = nn.ModuleList(AggregatedAttention(dim, dim // 32) for _ in range(layers))
        self.cross_layers = nn.ModuleList(AggregatedAttention(dim, dim // 32) for _ in range(layers))
        self.descriptor = nn.Linear(dim, dim)
        nn.init.normal_(self.descriptor.weight, std=0.5 * dim**-0.5)  # else the first loss is far above log(cells)
        self.matchable = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 1))
        self.lateral3 = nn.Conv2d(dim, quarter, 1)
        self.lateral2 = nn.Conv2d(quarter, quarter, 1)
        self.merge2 = RepConv(quarter, fine)
        self.lateral1 = nn.Conv2d(half, fine, 1)
        self.merge1 = RepConv(fine, fine)
        self.window = WindowRefiner(fine, dim)
        self.patch = PatchRefiner(fine)

    def pyramid(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image [B, 1, H, W] in [0, 1] -> maps at 1/2, 1/4 and 1/8; every image is standardised by itself."""
        x1 = self.stage1(self.standardised(image))
        x2 = self.stage2(x1)
        return x1, x2, self.stage3(x2)

    def standardised(self, image: Tensor) -> Tensor:
        image = image.float()
        centred = image - image.mean((1, 2, 3), keepdim=True)
        deviation = (centred * centred).mean((1, 2, 3), keepdim=True).sqrt()
        return (centred / (deviation + 0.02)).to(self.descriptor.weight.dtype)

    def attend(self, tokens: list[Tensor], rope_scale: float = 1.0) -> list[Tensor]:
        """Self and cross attention. tokens: [B, h, w, dim] of each image, or one [2B, h, w, dim] with both stacked."""
        tables = [rotary_table(t.shape[1] // 4, t.shape[2] // 4, self.dim, rope_scale, t) for t in tokens]
        for self_layer, cross_layer in zip(self.self_layers, self.cross_layers, strict=True):
            tokens = [self_layer(t, t, table) for t, table in zip(tokens, tables, strict=True)]
            others = [torch.cat(tokens[0].chunk(2)[::-1])] if len(tokens) == 1 else tokens[::-1]
            tokens = [cross_layer(t, other) for t, other in zip(tokens, others, strict=True)]
        return tokens

    def heads(self, x1: Tensor, x2: Tensor, tokens: Tensor) -> Features:
        """Maps and attended tokens -> everything that matching needs."""
        fine = upsample(self.lateral3(tokens.permute(0, 3, 1, 2)), 2, (2, 3)) + self.lateral2(x2)
        fine = upsample(self.merge2(fine), 2, (2, 3)) + self.lateral1(x1)
        fine = self.merge1(fine)
        keys, queries = self.window.keys_and_queries(fine, tokens)
        return Features(self.descriptor(tokens), self.matchable(tokens)[..., 0], keys, queries, self.patch.detail(fine))

    def features(self, images: Tensor, rope_scale: float = 1.0) -> Features:
        """images [2B, 1, H, W] in [0, 1], views 0 first, sides multiples of 32; rope_scale see rotary_table."""
        x1, x2, x3 = self.pyramid(images)
        (tokens,) = self.attend([x3.permute(0, 2, 3, 1).contiguous()], rope_scale)
        return self.heads(x1, x2, tokens)

    def forward(self, images: Tensor, rope_scale: float = 1.0) -> Features:
        return self.features(images, rope_scale)


def similarity(descriptors0: Tensor, descriptors1: Tensor) -> Tensor:
    """Logits of the dual softmax: descriptors [B, h, w, d] of both images -> [B, h0 * w0, h1 * w1], fp32."""
    dim = descriptors0.shape[-1]
    a, b = descriptors0.float().flatten(1, 2), descriptors1.float().flatten(1, 2)
    return torch.bmm(a * (SHARPNESS / dim), b.transpose(1, 2))


def cell_centres(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Centres (x, y) [h * w, 2] of the cells of a 1/8 map of that size, row by row."""
    x = torch.arange(width, device=device) * float(CELL) + (CELL - 1) / 2
    y = torch.arange(height, device=device) * float(CELL) + (CELL - 1) / 2
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).reshape(-1, 2)
