"""Bilinear upsampling to fixed sizes as products with constant matrices.

In fp16 on a GPU they run at the speed of memory and in the layout that convolutions want, channels last; ONNX Runtime's
own upsampling is several times slower and takes the other layout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weights(old: int, new: int, *, align_corners: bool, like: Tensor) -> Tensor:
    """[new, old], of which each row holds the weights of the old pixels in one new pixel; see F.interpolate."""
    place = torch.arange(new, device=like.device, dtype=torch.float32)
    position = place * ((old - 1) / (new - 1)) if align_corners else (place + 0.5) * (old / new) - 0.5
    distance = (position.clamp(0, old - 1)[:, None] - torch.arange(old, device=like.device)).abs()
    return (1 - distance).clamp(min=0).to(like.dtype)


def upsampled_sum(maps: list[Tensor], size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """The sum of maps [B, C, h, w] of any sizes, each upsampled bilinearly to `size` (height, width), [B, C, *size]."""
    batch, channels = maps[0].shape[:2]
    height, width = size
    columns, rows = [], []
    for x in maps:
        across = weights(x.shape[3], width, align_corners=align_corners, like=x)
        # A matrix for each image: with one for all, ONNX Runtime takes a slower product.
        columns.append(across.expand(batch, -1, -1) @ x.permute(0, 3, 2, 1).flatten(2))  # [B, width, h C]
        rows.append(weights(x.shape[2], height, align_corners=align_corners, like=x))
    surplus = -sum(x.shape[2] for x in maps) % 8  # fast products need multiples of 8
    if surplus:
        columns.append(columns[0].new_zeros(batch, width, surplus * channels))
        rows.append(rows[0].new_zeros(height, surplus))
    wide = torch.cat(columns, dim=2) if len(columns) > 1 else columns[0]
    wide = wide.unflatten(2, (-1, channels)).transpose(1, 2).flatten(2)  # [B, sum of h, width C]
    down = torch.cat(rows, dim=1).expand(batch, -1, -1)
    return (down @ wide).unflatten(2, (width, channels)).permute(0, 3, 1, 2)
