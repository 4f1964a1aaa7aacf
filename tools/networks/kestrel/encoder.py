"""Kestrel's features as they are exported: what is linear folded together, fewer and larger operators.

`Kestrel.features` is the form that is trained; here are the same numbers with some weights multiplied out in advance.
Maps stay [B, H, W, C] wherever attention looks at them, which is how a GPU's convolutions keep them anyway.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.kestrel.attending import BLOCK, Attention, FixedAttention, Grid, interpolation, table
from matchanything_tools.networks.kestrel.blocks import AggregatedAttention
from matchanything_tools.networks.kestrel.model import SHARPNESS, Features, Kestrel
from matchanything_tools.networks.products import Pointwise, transposed_matmul
from matchanything_tools.networks.stripes import PairedConv, StripedConv


class Encoder(nn.Module):
    """Images [B, 1, H, W] in [0, 1] -> Features of each; takes over the layers of a network whose blocks are fused.

    Descriptors come multiplied by the square root of the sharpness over their length, so that their products are the
    logits; queries by the square root of theirs. In the place of the keys is the map that they are a layer of.
    """

    query_context: Tensor

    def __init__(self, network: Kestrel) -> None:
        super().__init__()
        self.network = network
        self.self_layers = nn.ModuleList(self.layer(layer, True) for layer in _layers(network.self_layers))
        self.cross_layers = nn.ModuleList(self.layer(layer, False) for layer in _layers(network.cross_layers))
        self.descriptor: nn.Module = _scaled(network.descriptor, (SHARPNESS / network.dim) ** 0.5)
        self.matchable = network.matchable
        window = network.window
        scale = window.key.out_channels**-0.5
        self.register_buffer("query_context", window.query_context.weight.detach().T * scale)
        self.query_detail = nn.Conv2d(window.key.in_channels, window.key.out_channels, BLOCK, BLOCK)
        weight = window.query_detail.weight.detach().clone()
        weight[:, :, 1:3, 1:3] += window.key.weight.detach() / 4  # the mean of the cell's own central keys
        self.query_detail.weight = nn.Parameter(weight * scale)
        bias = window.query_detail.bias + window.key.bias + window.query_context.bias  # type: ignore[operator]
        self.query_detail.bias = nn.Parameter(bias.detach() * scale)
        self.requires_grad_(False)

    def layer(self, layer: AggregatedAttention, turns: bool) -> Attention:
        return Attention(layer, turns)

    def forward(self, images: list[Tensor]) -> list[Features]:
        """Two batches of one image."""
        maps = [self.network.pyramid(image) for image in images]
        tokens = [x3.permute(0, 2, 3, 1) for _, _, x3 in maps]
        tables = [table(x) for x in tokens]
        for self_layer, cross_layer in zip(self.self_layers, self.cross_layers, strict=True):
            tokens = [self_layer(x, self_layer.maxima(x), turns) for x, turns in zip(tokens, tables, strict=True)]
            maxima = [cross_layer.maxima(x) for x in tokens]
            tokens = [cross_layer(x, other) for x, other in zip(tokens, maxima[::-1], strict=True)]
        return [self.heads(x1, x2, x) for (x1, x2, _), x in zip(maps, tokens, strict=True)]

    def heads(self, x1: Tensor, x2: Tensor, tokens: Tensor) -> Features:
        fine = self.network.merge1(self.merged(x1, x2, tokens))
        return Features(
            self.descriptor(tokens),
            self.matchable(tokens).squeeze(-1),
            fine.permute(0, 2, 3, 1),
            self.query_detail(fine).permute(0, 2, 3, 1) + tokens @ self.query_context,
            self.normalised(self.network.patch.project(fine)),
        )

    def merged(self, x1: Tensor, x2: Tensor, tokens: Tensor) -> Tensor:
        """What the last convolution at 1/2 sees."""
        network = self.network
        fine = _double(network.lateral3(tokens.permute(0, 3, 1, 2))) + network.lateral2(x2)
        return _double(network.merge2(fine)) + network.lateral1(x1)

    def normalised(self, x: Tensor) -> Tensor:
        """x / sqrt(1e-2 + sum of squares over channels), [B, C, H, W]; the sum is a convolution, which leaves it on all
        channels: faster than a reduction and a broadcast."""
        channels = x.shape[1]
        weight, bias = torch.ones(channels, channels, 1, 1, dtype=x.dtype), torch.full((channels,), 1e-2, dtype=x.dtype)
        return x / F.conv2d(x * x, weight, bias).sqrt()


class FixedEncoder(Encoder):
    """The same for one batch of two images, whose size is known when the graph is made: operators that GPUs prefer.

    The biases of what joins the maps are added where these are still smaller: bilinear enlargement keeps constants.
    """

    from_quarter: Tensor
    from_half: Tensor
    floor: Tensor

    def __init__(self, network: Kestrel) -> None:
        super().__init__(network)
        self.first = StripedConv(network.stage1[0][0], 2)  # type: ignore[index]
        self.second = PairedConv(network.stage1[1][0])  # type: ignore[index]
        self.down = StripedConv(network.stage3[0][0], 2)  # type: ignore[index]
        self.descriptor = Pointwise(self.descriptor)
        self.matchable = nn.Sequential(Pointwise(network.matchable[0]), network.matchable[1:])
        lateral3, lateral2, lateral1 = network.lateral3, network.lateral2, network.lateral1
        self.lateral3 = _with_bias(lateral3, lateral3.bias + lateral2.bias)  # type: ignore[operator]
        merge2 = _with_bias(network.merge2[0], network.merge2[0].bias + lateral1.bias)  # type: ignore[index,operator]
        self.merge2 = PairedConv(merge2)
        self.register_buffer("floor", lateral1.bias.detach().clone())  # type: ignore[union-attr]
        self.register_buffer("from_quarter", lateral2.weight.detach().flatten(1).T.contiguous())
        self.register_buffer("from_half", lateral1.weight.detach().flatten(1).T.contiguous())
        self.requires_grad_(False)

    def layer(self, layer: AggregatedAttention, turns: bool) -> Attention:
        return FixedAttention(layer, turns)

    def forward(self, images: list[Tensor]) -> list[Features]:
        """One batch of two images."""
        (both,) = images
        x1, x2, x3 = self.pyramid(both)
        x = x3.permute(0, 2, 3, 1)
        grid = Grid.of(x)
        for self_layer, cross_layer in zip(self.self_layers, self.cross_layers, strict=True):
            x = self_layer(x, self_layer.maxima(x), grid.turns, grid)
            exchanged = cross_layer.maxima(x).index_select(0, torch.tensor([1, 0], device=x.device))
            x = cross_layer(x, exchanged, None, grid)
        return [self.heads(x1, x2, x)]

    def pyramid(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Kestrel.pyramid, with pairs of columns as channels where that is faster."""
        x1 = F.relu(self.second(F.relu(self.first(self.standardised(images)))))
        x2 = self.network.stage2(x1)
        return x1, x2, self.network.stage3[1:](F.relu(self.down(x2)))

    def standardised(self, images: Tensor) -> Tensor:
        """As Kestrel.standardised, with means as products."""
        pixels = images.flatten(1)
        mean = pixels.new_full((pixels.shape[1], 1), 1 / pixels.shape[1])
        centred = pixels - pixels @ mean
        deviation = ((centred * centred) @ mean).sqrt()
        rows = (centred / (deviation + 0.02)).to(self.network.descriptor.weight.dtype)
        return rows.reshape(*images.shape[:1], *images.shape[2:], 1).permute(0, 3, 1, 2)

    def normalised(self, x: Tensor) -> Tensor:
        # As a matrix: where only one axis is shared by all columns, ONNX Runtime divides in less than half the time.
        pixels = x.permute(0, 2, 3, 1)
        rows = pixels.reshape(-1, x.shape[1])
        squares = (rows * rows) @ rows.new_ones(x.shape[1], 1)
        return (rows / (squares + 1e-2).sqrt()).reshape(pixels.shape).permute(0, 3, 1, 2)

    def merged(self, x1: Tensor, x2: Tensor, tokens: Tensor) -> Tensor:
        fine = _double_by_products(self.lateral3(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        fine = self.merge2(_add_product(fine, x2, self.from_quarter)).permute(0, 2, 3, 1)
        # A ReLU, moved up by the bias that is already in there.
        return _add_product(_double_by_products(torch.maximum(fine, self.floor)), x1, self.from_half)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _double_by_products(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, 2 H, 2 W, C], for fixed sizes."""
    batch, height, width, channels = x.shape
    across, down = (interpolation(length, 2, x).T for length in (width, height))
    x = x.reshape(batch * height, width, channels)
    x = transposed_matmul(across.expand(batch * height, -1, -1), x).reshape(batch, height, 2 * width * channels)
    x = transposed_matmul(down.expand(batch, -1, -1), x)
    return x.reshape(batch, 2 * height, 2 * width, channels)


def _add_product(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """x [B, H, W, C] plus a 1x1 convolution of other [B, D, H, W] -> [B, C, H, W]: half the time of those two."""
    rows = other.permute(0, 2, 3, 1).reshape(-1, other.shape[1])
    return torch.addmm(x.reshape(-1, x.shape[3]), rows, weight).reshape(x.shape).permute(0, 3, 1, 2)


def _scaled(linear: nn.Linear, factor: float) -> nn.Linear:
    result = nn.Linear(linear.in_features, linear.out_features)
    result.weight = nn.Parameter(linear.weight.detach() * factor)
    result.bias = nn.Parameter(linear.bias.detach() * factor)
    return result


def _with_bias(conv: nn.Conv2d, bias: Tensor) -> nn.Conv2d:
    result = copy.deepcopy(conv)
    result.bias = nn.Parameter(bias.detach().clone())
    return result


def _layers(modules: nn.ModuleList) -> list[AggregatedAttention]:
    return [module for module in modules if isinstance(module, AggregatedAttention)]
