"""Multi-head attention as one operator that ONNX Runtime runs fused and that every other runtime can take apart.

In an exported graph it is a node `com.microsoft::MultiHeadAttention` *with a function body* in standard operators:
ONNX Runtime knows the operator and picks its flash-attention kernel, TensorRT's parser inlines the body.
"""

from __future__ import annotations

import onnx_ir
import torch
import torch.nn.functional as F
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import nn

_DOMAIN = "com.microsoft"


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for each of `num_heads` heads of width D; all [B, N, num_heads * D]."""
    if torch.onnx.is_in_onnx_export():
        result = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::MultiHeadAttention",
            (query, key, value),
            {"num_heads": num_heads},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
        assert isinstance(result, torch.Tensor)
        return result
    heads = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens [B, N, width], with q, k and v in one published matrix."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    @torch.no_grad()
    def bake(self) -> None:
        """Three matrices instead of one that is split again, and of their biases only that of the query.

        The key's adds the same to all scores of a query, which the softmax cancels; the value's passes through the
        weights, whose sum is 1, and so belongs to the bias of the projection.
        """
        query, key, value = self.qkv.weight.chunk(3)
        bias = None
        if self.qkv.bias is not None:
            bias, _, of_value = self.qkv.bias.chunk(3)
            self.proj.bias = nn.Parameter(self.proj.bias + self.proj.weight @ of_value, requires_grad=False)
        del self.qkv
        self.query, self.key, self.value = _linear(query, bias), _linear(key), _linear(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "qkv"):
            query, key, value = self.qkv(x).chunk(3, dim=2)
        else:
            query, key, value = self.query(x), self.key(x), self.value(x)
        return self.proj(attention(query, key, value, self.heads))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


@script(Opset(_DOMAIN, 1), default_opset=op)
def MultiHeadAttention(query, key, value, num_heads: int):  # type: ignore[no-untyped-def]
    heads = op.Concat(op.Constant(value_ints=[0, 0]), op.Reshape(num_heads, [1]), op.Constant(value_ints=[-1]), axis=0)
    # [B, N, heads * D] -> [B, heads, N, D], the key transposed
    q = op.Transpose(op.Reshape(query, heads), perm=[0, 2, 1, 3])
    k = op.Transpose(op.Reshape(key, heads), perm=[0, 2, 3, 1])
    v = op.Transpose(op.Reshape(value, heads), perm=[0, 2, 1, 3])
    width = op.CastLike(op.Shape(q, start=3, end=4), query)
    weights = op.Softmax(op.MatMul(op.Div(q, op.Sqrt(width)), k), axis=-1)
    merged = op.Transpose(op.MatMul(weights, v), perm=[0, 2, 1, 3])
    return op.Reshape(merged, op.Constant(value_ints=[0, 0, -1]))


def add_function_bodies(model: onnx_ir.Model) -> None:
    """Give the attention nodes of an exported model, if there are any, their body in standard operators."""
    if any(node.domain == _DOMAIN and node.op_type == "MultiHeadAttention" for node in model.graph):
        function = onnx_ir.from_proto(MultiHeadAttention.to_function_proto())
        assert isinstance(function, onnx_ir.Function)
        model.functions[function.identifier()] = function
        model.opset_imports.setdefault(_DOMAIN, 1)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them, four times as wide inside; the ViT's key names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]."""
        return self.fc2(F.gelu(self.fc1(x)))
