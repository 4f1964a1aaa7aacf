"""Lengths of many vectors by a product of matrices: ONNX Runtime's reductions are several times slower on a GPU."""

from __future__ import annotations

import torch
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import Tensor

from matchanything_tools.networks.products import DOMAIN


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


def of_unit_length(vectors: Tensor) -> Tensor:
    """[B, N, C] float32, each vector divided by its length, 0 by 1.

    In ONNX the root mean square norm that adds first, here the vectors to themselves: one kernel, 7 us instead of the
    17 of eight for 4000 vectors of 128 on an H200.
    """
    count = vectors.shape[-1]
    if torch.onnx.is_in_onnx_export():
        scale = torch.full((count,), count**-0.5, device=vectors.device)
        result = torch.onnx.ops.symbolic(
            f"{DOMAIN}::SkipSimplifiedLayerNormalization",
            (vectors, vectors, scale),
            {"epsilon": 1e-24},
            dtype=vectors.dtype,
            shape=vectors.shape,
            version=1,
        )
        assert isinstance(result, Tensor)
        return result
    return vectors / lengths(vectors)


@script(Opset(DOMAIN, 1), default_opset=op)
def SkipSimplifiedLayerNormalization(input, skip, gamma, epsilon: float):  # type: ignore[no-untyped-def]
    total = op.Add(input, skip)
    mean = op.ReduceMean(op.Mul(total, total), op.Constant(value_ints=[-1]))
    return op.Mul(op.Div(total, op.Sqrt(op.Add(mean, op.Constant(value_float=epsilon)))), gamma)
