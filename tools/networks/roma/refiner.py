"""Convolutional refinement of flow and certainty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from matchanything_tools.networks.depthwise import BoundedDepthwise
from matchanything_tools.networks.roma.correlation import local_correlation
from matchanything_tools.networks.roma.grids import pixel_grid

FEATURES = {16: 512, 8: 512, 4: 256, 2: 64, 1: 9}  # channels of the projected features by stride
EMBEDDING = {16: 128, 8: 64, 4: 32, 2: 16, 1: 6}  # channels of the embedded displacement
RADIUS = {16: 7, 8: 3, 4: 2}  # of the local correlation, where there is one
HIDDEN_BLOCKS = 8
SHORT = 32  # ONNX Runtime concatenates at half its speed if one piece has fewer fp16 values in a row than this

Pair = tuple[torch.Tensor, ...]  # one of image 0 and one of image 1


class ConvRefiner(nn.Module):
    """Features [1, H, W, C] of each image and flow [2, 2, H, W] -> raw correction [2, 3, H, W] of flow and certainty.

    Where there is a correlation, it needs features times `gain`: their products are then divided by sqrt(C).
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.radius = RADIUS.get(stride)
        self.gain = FEATURES[stride] ** -0.25
        self.inputs = 2 * FEATURES[stride] + EMBEDDING[stride]
        width = self.inputs + (0 if self.radius is None else (2 * self.radius + 1) ** 2)
        self.disp_emb = nn.Conv2d(2, EMBEDDING[stride], 1)
        self.block1 = _block(width)
        self.hidden_blocks = nn.Sequential(*(_block(width) for _ in range(HIDDEN_BLOCKS)))
        self.out_conv: nn.Module = nn.Conv2d(width, 3, 1)

    def forward(self, features: Pair, flow: torch.Tensor, zoom: float) -> torch.Tensor:
        """zoom: size of this pass over the size of the first."""
        displacement = ((40 / 32 * zoom) * (flow - pixel_grid(*flow.shape[2:]))).to(features[0].dtype)
        grids = torch.stack((flow[:, 0], flow[:, 1]), 3).split(1)  # not permuted, for which ONNX Runtime takes longer
        parts = [[x, _sample(y, grid)] for x, y, grid in zip(features, features[::-1], grids, strict=True)]
        if self.radius is None and isinstance(self.out_conv, _Head):
            both = self._embed(displacement.flatten(0, 1)[None])  # see `bake`
            return self._run(torch.cat((*parts[0], both, *parts[1]), 3).permute(0, 3, 1, 2))
        for part, at in zip(parts, displacement.split(1), strict=True):
            part.append(self._embed(at))
        if self.radius is not None:
            scaled = features if self.gain == 1 else [x * self.gain for x in features]
            for part, correlation in zip(parts, local_correlation(scaled, flow, self.radius).split(1), strict=True):
                if correlation.shape[3] < SHORT:
                    correlation = torch.cat((part.pop(), correlation), 3)
                part.append(correlation)
        if isinstance(self.out_conv, _Head):
            return self._run(torch.cat([*parts[0], *parts[1]], 3).permute(0, 3, 1, 2))
        x = torch.cat([torch.cat(part, 3) for part in parts]).permute(0, 3, 1, 2)
        return self.out_conv(self.hidden_blocks(self.block1(x)).float())

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        """Both directions side by side as channels [1, 2 C, H, W] -> [2, 3, H, W]."""
        return self.out_conv(self.hidden_blocks(x)).reshape(2, 3, *x.shape[2:])

    def _embed(self, displacement: torch.Tensor) -> torch.Tensor:
        """Displacement [1, 2, H, W] -> [1, H, W, E]; of both directions [1, 4, H, W] -> [1, H, W, 2 E]."""
        weight, bias = self.disp_emb.weight[:, :, 0, 0], self.disp_emb.bias
        columns = displacement.flatten(2)
        if bias is None:  # it is one more column
            columns = torch.cat((columns, torch.ones_like(columns[:, :1])), 1)
        return F.linear(columns.transpose(1, 2), weight, bias).unflatten(1, displacement.shape[2:])

    def narrow(self) -> ConvRefiner:
        """Everything in fp16, after `bake`; the head as exact as before."""
        self.disp_emb.half()
        self.hidden_blocks.half()
        assert isinstance(self.out_conv, _Head)
        self.out_conv.split()
        return self

    @torch.no_grad()
    def bake(self, projection: nn.Conv2d | None = None) -> ConvRefiner:
        """Reshape it for export, when its batch norms are folded; no result changes.

        Both directions become one map, side by side as channels: depthwise convolutions are fast where their number of
        channels is a large multiple of 64. Channels that are always zero widen each to the next multiple of 64 (of 8
        where narrow): the published widths (1377, 1137, 569) keep matrix units idle. They stand after the
        displacement's, whose product can make zeros. One of them becomes the constant 1, whose weights are the biases
        of the 1x1 convolutions: then these are plain products. The last of them and the head are one product, since
        nothing stands between them. Without a correlation the displacements of both directions are one product and one
        piece of the input, in its middle: in the second direction they stand first.
        projection: what makes the features; it takes the `gain` if given, and the first weights here undo that.
        """
        width = self.out_conv.get_parameter("weight").shape[1]
        extra = -(width + 1) % (64 if width > 256 else 8) + 1
        embedding, blocks = self.disp_emb, [self.block1, *self.hidden_blocks]
        baked: list[nn.Module] = []
        if projection is not None:
            projection.weight.mul_(self.gain)
            assert projection.bias is not None
            projection.bias.mul_(self.gain)
            channels = 2 * projection.out_channels
            blocks[0][0].weight[:channels] /= self.gain
            self.gain = 1.0
        for block in blocks:
            depthwise, pointwise = block[0], block[3]
            weight, bias = (self._insert(x, 0, extra) for x in (depthwise.weight, depthwise.bias))
            # relu(x + b) = max(x, -b) + b, and the following product takes the b into its own bias.
            bound = -bias
            mix, own = pointwise.weight[:, :, 0, 0], pointwise.bias
            if block is blocks[-1]:
                head = self.out_conv.weight[:, :, 0, 0]
                mix, own = head @ mix, head @ own + self.out_conv.bias
            else:
                mix, own = self._insert(mix, 0, extra), self._insert(own, 0, extra)
            mix = self._insert(mix, 1, extra)
            own = own + mix @ bias
            bound[self.inputs] = 1.0
            mix[:, self.inputs] = own
            if block is self.block1 and self.radius is None:
                other = torch.arange(len(bound)).roll(embedding.out_channels + extra)
                baked.append(BoundedDepthwise(torch.cat((weight, weight[other])), torch.cat((bound, bound[other]))))
                baked.append(_Mix(torch.block_diag(mix, mix[:, other])))
                continue
            baked.append(BoundedDepthwise(weight, bound).repeated(2))
            if block is blocks[-1]:
                baked.append(_Head(torch.block_diag(mix, mix)))
            else:  # a product 64 wide is at the speed of memory, one 32 wide is not
                baked.append(_Mix(torch.block_diag(mix, mix) if len(mix) <= 32 else mix))
        self.out_conv = baked.pop()
        self.hidden_blocks = nn.Sequential(*baked)
        del self.block1
        assert embedding.bias is not None
        values = (embedding.weight, embedding.bias[:, None, None, None])
        weight, own = (torch.cat((x, x.new_zeros(extra, *x.shape[1:]))) for x in values)
        if self.radius is None:
            weight, own = torch.block_diag(*2 * (weight[:, :, 0, 0],))[..., None, None], torch.cat((own, own))
        embedding.weight = _constant(torch.cat((weight, own), 1))
        embedding.bias = None
        return self

    def _insert(self, tensor: torch.Tensor, axis: int, count: int) -> torch.Tensor:
        head, tail = tensor.tensor_split([self.inputs], axis)
        shape = list(tensor.shape)
        shape[axis] = count
        return torch.cat((head, tensor.new_zeros(shape), tail), axis)


class _Mix(nn.Module):
    """The same 1x1 convolution of both directions, or one of both together, as a product of matrices."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = _constant(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.permute(0, 2, 3, 1).unflatten(3, (-1, self.weight.shape[1]))
        return F.linear(pixels, self.weight).flatten(3).permute(0, 3, 1, 2)


class _Head(_Mix):
    """The last one, of both directions to three channels each: [1, 6, H, W] float32."""

    def split(self) -> _Head:
        """Compute in fp16 what is as exact as in fp32, and never write in fp32 what is as wide as the input.

        The weights become the sum of two in fp16. Of the product a second one computes what the first was rounded by.
        """
        weight = self.weight
        self.weight = _constant(weight.half())
        self.rest = _constant((weight - self.weight.float()).half())
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
        if self.weight.dtype == torch.float16:
            result, low = (torch.cat((self.weight, self.rest)) @ pixels.T).chunk(2)
            rounding = torch.addmm(result, self.weight, pixels.T, alpha=-1)
            result = result.float() - (rounding - low).float()
        else:
            result = self.weight @ pixels.T
        return result.unflatten(1, x.shape[2:])[None]


def _sample(features: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Features [1, H, W, C] of the other image at the normalised positions [1, H, W, 2]."""
    sampled = F.grid_sample(features.float().permute(0, 3, 1, 2), grid, align_corners=False)
    return sampled.permute(0, 2, 3, 1).to(features.dtype)


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 5, padding=2, groups=width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
    )


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
