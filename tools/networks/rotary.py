"""Rotary position encoding (Su et al., 2021): every pair of channels turned by an angle that depends on the position.

As in attention.py: a node of ONNX Runtime's own operators, one kernel on a GPU, with a function body in standard ones.
"""

from __future__ import annotations

import torch
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset

from matchanything_tools.networks.products import DOMAIN


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Channels (2k, 2k + 1) of x [B, N, C] turned by the angle whose cosine and sine are in column k of [N, C / 2]."""
    if torch.onnx.is_in_onnx_export():
        # TensorRT knows the operator, too, with a position for every row.
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        result = torch.onnx.ops.symbolic(
            f"{DOMAIN}::RotaryEmbedding",
            (x, positions, cos, sin),
            {"interleaved": 1, "num_heads": 1},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        assert isinstance(result, torch.Tensor)
        return result
    even, odd = x.unflatten(2, (-1, 2)).unbind(3)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], 3).flatten(2)


def rotated(weight: torch.Tensor) -> torch.Tensor:
    """Rows (a, b) of every pair of channels -> (-b, a): the part of a rotation that the sine multiplies."""
    pairs = weight.reshape(-1, 2, weight.shape[1])
    return torch.stack([-pairs[:, 1], pairs[:, 0]], 1).reshape(weight.shape)


@script(Opset(DOMAIN, 1), default_opset=op)
def RotaryEmbedding(input, positions, cos, sin, interleaved: int, num_heads: int):  # type: ignore[no-untyped-def]
    pairs = op.Reshape(input, op.Constant(value_ints=[0, 0, -1, 2]))
    even = op.Gather(pairs, op.Constant(value_int=0), axis=3)
    odd = op.Gather(pairs, op.Constant(value_int=1), axis=3)
    last = op.Constant(value_ints=[3])
    turned_even = op.Unsqueeze(op.Sub(op.Mul(even, cos), op.Mul(odd, sin)), last)
    turned_odd = op.Unsqueeze(op.Add(op.Mul(odd, cos), op.Mul(even, sin)), last)
    return op.Reshape(op.Concat(turned_even, turned_odd, axis=3), op.Shape(input))
