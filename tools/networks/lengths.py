"""Lengths of many vectors by a product of matrices: ONNX Runtime's reductions are several times slower on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths(vectors: Tensor) -> Tensor:
    """Euclidean lengths [..., 1] float32 of [..., C], at least 1e-12. In fp16 no component may be above 255.

    The mean of the squares, which fp16 holds where it may not hold their sum; in eight equal columns, the least that
    matrix units take.
    """
    count = vectors.shape[-1]
    mean = (vectors * vectors) @ torch.full((count, 8), 1 / count, dtype=vectors.dtype, device=vectors.device)
    return (count * mean[..., :1].float()).sqrt().clamp(min=1e-12)


def lengths_in_blocks(vectors: Tensor) -> Tensor:
    """The same, [B, N] float32 of blocks of few vectors [B, N, C]; in fp16 no length may be above 255.

    In fp16 from the products of all pairs of a block, which read the vectors once; squares and their sums take three
    passes over them.
    """
    if vectors.dtype != torch.float16:
        return lengths(vectors).squeeze(2)
    pairs = vectors @ vectors.transpose(1, 2)
    return pairs.flatten(1)[:, :: vectors.shape[1] + 1].float().sqrt().clamp(min=1e-12)
