"""Transformer blocks in operators that ONNX Runtime runs fused and that every other runtime can take apart.

In an exported graph they are nodes `com.microsoft::MultiHeadAttention` and `SkipLayerNormalization` *with a function
body* in standard operators: ONNX Runtime knows the operators (flash attention; residual, bias and norm in one kernel),
TensorRT's parser inlines the bodies.
"""

from __future__ import annotations

from typing import cast

import onnx_ir
import torch
import torch.nn.functional as F
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import nn

from matchanything_tools.networks.lengths import SkipSimplifiedLayerNormalization
from matchanything_tools.networks.products import DOMAIN, FusedMatMul
from matchanything_tools.networks.rotary import RotaryEmbedding
from matchanything_tools.networks.sampling import DeformConv


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for each of `num_heads` heads of width D; all [B, N, num_heads * D]."""
    if torch.onnx.is_in_onnx_export():
        result = torch.onnx.ops.symbolic(
            f"{DOMAIN}::MultiHeadAttention",
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


def add_and_norm(
    x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor, norm: nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of a residual branch and the norm behind it: norm(s) and s = x + branch + bias; all [B, N, C]."""
    if torch.onnx.is_in_onnx_export():
        normed, _, _, total = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::SkipLayerNormalization",
            (branch, x, norm.weight, norm.bias, bias),
            {"epsilon": norm.eps},
            dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
            shapes=(x.shape, (*x.shape[:-1], 1), (*x.shape[:-1], 1), x.shape),
            version=1,
        )
        return normed, total
    total = x + (branch + bias)
    return norm(total), total


def norm_by_rows(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """norm(x) of [B, N, C] by the kernel that adds first, here x to itself: ONNX Runtime's for the norm alone is twice
    as slow on a GPU. Of 2 x with four times the epsilon the norm is the same, and nothing else needs to be read."""
    if torch.onnx.is_in_onnx_export():
        result = torch.onnx.ops.symbolic(
            f"{DOMAIN}::SkipLayerNormalization",
            (x, x, norm.weight, norm.bias, x.new_zeros(x.shape[2])),
            {"epsilon": 4 * norm.eps},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        assert isinstance(result, torch.Tensor)
        return result
    normed: torch.Tensor = norm(x)
    return normed


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
        return self.proj(self.mix(x))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """All but the last projection."""
        if hasattr(self, "qkv"):
            query, key, value = self.qkv(x).chunk(3, dim=2)
        else:
            query, key, value = self.query(x), self.key(x), self.value(x)
        return attention(query, key, value, self.heads)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear


@script(Opset(DOMAIN, 1), default_opset=op)
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


@script(Opset(DOMAIN, 1), default_opset=op)
def SkipLayerNormalization(input, skip, gamma, beta, bias, epsilon: float):  # type: ignore[no-untyped-def]
    total = op.Add(skip, op.Add(input, bias))
    output = op.LayerNormalization(total, gamma, beta, axis=-1, epsilon=epsilon)
    none = op.Identity(total)  # in the place of the statistics, which nobody reads
    return output, none, none, total


def add_function_bodies(model: onnx_ir.Model) -> None:
    """Give the nodes of an exported model that are ONNX Runtime's own, or that TensorRT's parser does not know, their
    bodies in standard operators. A runtime that has an operator of a body's name runs that."""
    outputs = {node.op_type: len(node.outputs) for node in model.graph}
    bodies = (MultiHeadAttention, SkipLayerNormalization, FusedMatMul, RotaryEmbedding)
    for body in (*bodies, SkipSimplifiedLayerNormalization, DeformConv):
        if body.name in outputs:
            function = onnx_ir.from_proto(body.to_function_proto())
            assert isinstance(function, onnx_ir.Function)
            del function.outputs[outputs[body.name] :]  # TensorRT's parser wants as many as the nodes have
            model.functions[function.identifier()] = function
            if function.domain == DOMAIN:
                model.opset_imports.setdefault(DOMAIN, 1)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them, four times as wide inside; the ViT's key names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block under the published names."""

    def __init__(self, width: int, heads: int, bias: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads, bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width)


def run_blocks(x: torch.Tensor, blocks: nn.ModuleList, final: nn.LayerNorm | None) -> torch.Tensor:
    """Blocks one after the other, and a last norm if there is one: [B, N, C] -> [B, N, C].

    Each addition is joined with the norm that follows it, be it the next block's: see `add_and_norm`.
    """
    every = cast(list[Block], list(blocks))
    normed = every[0].norm1(x)
    for block, following in zip(every, (*(other.norm1 for other in every[1:]), final), strict=True):
        attn, mlp = block.attn, block.mlp
        normed, x = add_and_norm(x, F.linear(attn.mix(normed), attn.proj.weight), attn.proj.bias, block.norm2)
        branch = F.linear(F.gelu(mlp.fc1(normed)), mlp.fc2.weight)
        if following is None:
            return x + (branch + mlp.fc2.bias)
        normed, x = add_and_norm(x, branch, mlp.fc2.bias, following)
    return normed
