"""Kestrel's features as they are exported: what is linear folded together, fewer and larger operators.

`Kestrel.features` is the form that is trained; here are the same numbers with some weights multiplied out in advance.
Maps stay [B, H, W, C] wherever attention looks at them, which is how a GPU's convolutions keep them anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.attention import attention, norm_by_rows
from matchanything_tools.networks.eloftr.transformer import rotated
from matchanything_tools.networks.kestrel.blocks import AggregatedAttention, rotary_table
from matchanything_tools.networks.kestrel.model import SHARPNESS, Features, Kestrel
from matchanything_tools.networks.products import transposed_matmul

BLOCK = 4  # cells per side of what attention works on


class Encoder(nn.Module):
    """Images [B, 1, H, W] in [0, 1] -> Features of each; takes over the layers of a network whose blocks are fused.

    together: the images have one size and come as one batch of two, and sizes are known when the graph is made: then
    operators that GPUs prefer are taken.
    Descriptors come multiplied by the square root of the sharpness over their length, so that their products are the
    logits; queries by the square root of theirs.
    """

    def __init__(self, network: Kestrel, together: bool) -> None:
        super().__init__()
        self.together = together
        self.pyramid = network.pyramid
        self.network = network
        self.self_layers = nn.ModuleList(Attention(layer, True, together) for layer in _layers(network.self_layers))
        self.cross_layers = nn.ModuleList(Attention(layer, False, together) for layer in _layers(network.cross_layers))
        self.descriptor = _scaled(network.descriptor, (SHARPNESS / network.dim) ** 0.5)
        window = network.window
        scale = window.key.out_channels**-0.5
        self.query_context = _scaled(window.query_context, scale)
        self.query_detail = nn.Conv2d(window.key.in_channels, window.key.out_channels, BLOCK, BLOCK)
        weight = window.query_detail.weight.detach().clone()
        weight[:, :, 1:3, 1:3] += window.key.weight.detach() / 4  # the mean of the cell's own central keys
        self.query_detail.weight = nn.Parameter(weight * scale)
        self.query_detail.bias = nn.Parameter((window.query_detail.bias + window.key.bias).detach() * scale)  # type: ignore[operator]
        self.requires_grad_(False)

    def forward(self, images: list[Tensor]) -> list[Features]:
        """One batch of two images, or two of one."""
        maps = [self.pyramid(image) for image in images]
        tokens = [x3.permute(0, 2, 3, 1) for _, _, x3 in maps]
        tables = [_table(x) for x in tokens]
        upsampling = [_upsampling(x) if self.together else None for x in tokens]
        for self_layer, cross_layer in zip(self.self_layers, self.cross_layers, strict=True):
            layers = zip(tokens, upsampling, tables, strict=True)
            tokens = [self_layer(x, self_layer.maxima(x), matrix, table) for x, matrix, table in layers]
            maxima = [cross_layer.maxima(x) for x in tokens]
            others = maxima[::-1] if len(maxima) == 2 else [_exchanged(maxima[0])]
            crossed = zip(tokens, others, upsampling, strict=True)
            tokens = [cross_layer(x, other, matrix) for x, other, matrix in crossed]
        return [self._heads(x1, x2, x) for (x1, x2, _), x in zip(maps, tokens, strict=True)]

    def _heads(self, x1: Tensor, x2: Tensor, tokens: Tensor) -> Features:
        network = self.network
        fine = self._double(network.lateral3(tokens.permute(0, 3, 1, 2))) + network.lateral2(x2)
        fine = self._double(network.merge2(fine)) + network.lateral1(x1)
        fine = network.merge1(fine)
        return Features(
            self.descriptor(tokens),
            network.matchable(tokens).squeeze(-1),
            network.window.key(fine).permute(0, 2, 3, 1),
            self.query_detail(fine).permute(0, 2, 3, 1) + self.query_context(tokens),
            _normalised(network.patch.project(fine)),
        )

    def _double(self, x: Tensor) -> Tensor:
        if not self.together:
            return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        batch, channels, height, width = x.shape
        across, down = (interpolation(length, 2, x).T for length in (width, height))
        x = x.permute(0, 2, 3, 1).reshape(batch * height, width, channels)
        x = transposed_matmul(across.expand(batch * height, -1, -1), x).reshape(batch, height, 2 * width * channels)
        x = transposed_matmul(down.expand(batch, -1, -1), x)
        return x.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """AggregatedAttention with its projections multiplied out: the rotation's exchange of channels goes into the
    projections, and what follows the message before the first nonlinearity, enlargement aside, is one matrix."""

    pool: Tensor
    to_query: Tensor
    to_key_value: Tensor
    from_message: Tensor
    from_cell: Tensor
    to_cell: Tensor

    def __init__(self, layer: AggregatedAttention, rotary: bool, together: bool) -> None:
        super().__init__()
        self.heads, self.rotary, self.together = layer.heads, rotary, together
        self.norm_in, self.norm_out = layer.norm_in, layer.norm_out
        query = layer.query.weight.double()
        key, value = layer.key_value.weight.double().chunk(2)
        first, dim = layer.mlp_in.weight.double(), len(query)
        weights = {
            "pool": layer.pool.permute(3, 1, 0, 2)
            if together
            else layer.pool,  # the weights of a convolution, or tiles
            "to_query": torch.cat((query, rotated(query))).T if rotary else query.T,
            "to_key_value": torch.cat((key, rotated(key), value) if rotary else (key, value)).T,
            "from_cell": first[:, :dim].T,
            "from_message": (first[:, dim:] @ layer.out.weight.double()).T,
            "to_cell": layer.mlp_out.weight.T,
        }
        for name, weight in weights.items():
            self.register_buffer(name, weight.detach().float().contiguous())

    def maxima(self, source: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H W / 16, C]: what keys and values are made of."""
        if self.together:
            pooled = F.max_pool2d(source.permute(0, 3, 1, 2), BLOCK).permute(0, 2, 3, 1)
        else:
            pooled = _tiles(source).amax(4).amax(2)
        return pooled.flatten(1, 2)

    def forward(
        self, x: Tensor, maxima: Tensor, upsampling: Tensor | None, table: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [B, H, W, C] attends to the image that `maxima` comes from; upsampling [B, H W / 16, H W]: of the message,
        where there is a matrix for it; table: see rotary_table, for self attention."""
        batch, height, width, dim = x.shape
        query = self._norm(self._pooled(x), self.norm_in) @ self.to_query
        keys_values = self._norm(maxima, self.norm_in) @ self.to_key_value
        if table is not None:
            cosine, sine = table
            query, turned = (query * torch.cat((cosine, sine), 1)).split(dim, -1)
            factors = torch.cat((cosine, sine, torch.ones_like(cosine)), 1)
            key, turned_key, value = (keys_values * factors).split(dim, -1)
            query, key = query + turned, key + turned_key
        else:
            key, value = keys_values.split(dim, -1)
        message = attention(query, key, value, self.heads) @ self.from_message
        if upsampling is None:
            message = enlarge(message.reshape(batch, height // BLOCK, width // BLOCK, 2 * dim), BLOCK)
        else:
            message = transposed_matmul(upsampling, message).reshape(batch, height, width, 2 * dim)
        # As one operator, which adds to what is there: a product and an addition take longer.
        hidden = torch.addmm(message.reshape(-1, 2 * dim), x.reshape(-1, dim), self.from_cell)
        hidden = F.leaky_relu(hidden).reshape(batch * height, width, 2 * dim)
        return x + self._norm(hidden @ self.to_cell, self.norm_out).reshape(x.shape)

    def _norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return norm_by_rows(x, norm) if self.together else norm(x)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.together:
            pooled = F.conv2d(x.permute(0, 3, 1, 2), self.pool, stride=BLOCK, groups=x.shape[3])
            return pooled.permute(0, 2, 3, 1).flatten(1, 2)
        return (_tiles(x) * self.pool).sum(4).sum(2).flatten(1, 2)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """[B, H, W, C] -> [B, factor H, factor W, C], bilinear as F.interpolate(align_corners=False), as two products."""
    batch, height, width, channels = x.shape
    x = interpolation(width, factor, x) @ x
    x = interpolation(height, factor, x) @ x.reshape(batch, height, factor * width * channels)
    return x.reshape(batch, factor * height, factor * width, channels)


def _upsampling(tokens: Tensor) -> Tensor:
    """[B, H W / 16, H W]: `enlarge` of [B, H W / 16, C] as one product with it, transposed."""
    batch, height, width, _ = tokens.shape
    rows, columns = (
        interpolation(length // BLOCK, BLOCK, torch.empty(0, device=tokens.device)).T for length in (height, width)
    )
    matrix = (rows[:, None, :, None] * columns[None, :, None, :]).reshape(1, -1, height * width)
    return matrix.to(tokens.dtype).expand(batch, -1, -1)


def interpolation(count: int, factor: int, like: Tensor) -> Tensor:
    """[factor * count, count]: weight of each sample for each of `factor` times as many; a runtime folds it."""
    position = (torch.arange(factor * count, device=like.device) + 0.5) / factor - 0.5
    weight = (1 - (position[:, None] - torch.arange(count, device=like.device)).abs()).clamp(min=0)
    return (weight / weight.sum(1, keepdim=True)).to(like.dtype)  # the outermost have one neighbour, which counts fully


def _normalised(x: Tensor) -> Tensor:
    """x / sqrt(1e-2 + sum of squares over channels), [B, C, H, W]; the sum is a convolution, which leaves it on all
    channels: faster than a reduction and a broadcast."""
    channels = x.shape[1]
    weight, bias = torch.ones(channels, channels, 1, 1, dtype=x.dtype), torch.full((channels,), 1e-2, dtype=x.dtype)
    return x / F.conv2d(x * x, weight, bias).sqrt()


def _table(tokens: Tensor) -> tuple[Tensor, Tensor]:
    _, height, width, dim = tokens.shape
    cosine, sine = rotary_table(height // BLOCK, width // BLOCK, dim, 1.0, tokens)
    return cosine.to(tokens.dtype), sine.to(tokens.dtype)


def _exchanged(x: Tensor) -> Tensor:
    return x.index_select(0, torch.tensor([1, 0], device=x.device))


def _tiles(x: Tensor) -> Tensor:
    batch, height, width, dim = x.shape
    return x.reshape(batch, height // BLOCK, BLOCK, width // BLOCK, BLOCK, dim)


def _scaled(linear: nn.Linear, factor: float) -> nn.Linear:
    result = nn.Linear(linear.in_features, linear.out_features)
    result.weight = nn.Parameter(linear.weight.detach() * factor)
    result.bias = nn.Parameter(linear.bias.detach() * factor)
    return result


def _layers(modules: nn.ModuleList) -> list[AggregatedAttention]:
    return [module for module in modules if isinstance(module, AggregatedAttention)]
