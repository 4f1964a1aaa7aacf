"""Products that runtimes have kernels for and ONNX has no operator for.

As in attention.py: a node of ONNX Runtime's own operators with a function body in standard ones.
"""

from __future__ import annotations

import torch
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset

DOMAIN = "com.microsoft"


def transposed_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a^T b for each of a batch: [B, K, M] and [B, K, N] to [B, M, N].

    A constant that is stored with K first needs no K that is a multiple of 8, which a fast product otherwise does; a
    Transpose before MatMul would be folded into the constant by optimisers.
    """
    if torch.onnx.is_in_onnx_export():
        result = torch.onnx.ops.symbolic(
            f"{DOMAIN}::FusedMatMul",
            (a, b),
            {"transA": 1},
            dtype=b.dtype,
            shape=(b.shape[0], a.shape[2], b.shape[2]),
            version=1,
        )
        assert isinstance(result, torch.Tensor)
        return result
    return a.transpose(1, 2) @ b


@script(Opset(DOMAIN, 1), default_opset=op)
def FusedMatMul(a, b, transA: int):  # type: ignore[no-untyped-def]
    return op.MatMul(op.Transpose(a, perm=[0, 2, 1]), b)
