"""The coarse-to-fine decoder of DeDoDe: features of several strides -> predictions that are summed over the scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchanything_tools.networks.depthwise import BoundedDepthwise
from matchanything_tools.networks.upsampling import upsampled_sum


class Refiner(nn.Module):
    """One scale: a full 1x1 block, depthwise 5x5 blocks, a residual connection over them, and a 1x1 output.

    As published, its input is the features of its scale and the context from the coarser one, concatenated, and its
    output the prediction and the context for the finer one. Decoder.fold takes the context out of both.
    """

    def __init__(self, in_channels: int, hidden: int, context: int, predictions: int, blocks: int) -> None:
        super().__init__()
        self.block1 = _block(in_channels, hidden, depthwise=False)
        self.hidden_blocks = nn.Sequential(*(_block(hidden, hidden, depthwise=True) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(hidden, predictions + context, 1)
        self.output = nn.ModuleList()  # of each part of the hidden channels: made by Decoder.fold
        self.as_channels = False  # see images_as_channels

    @torch.no_grad()
    def images_as_channels(self) -> None:
        """Make the images of a batch of two channels of one image, [1, 2 hidden, H, W], which the result then is, too.

        cuDNN's fast depthwise kernels take 64 channels at a time; for 32 of two images it has one a third as fast.
        """
        self.as_channels = True
        mixes = list(self.block1[1:].children())
        for block in self.hidden_blocks:
            assert isinstance(block, nn.Sequential) and isinstance(block[0], BoundedDepthwise)
            block[0] = block[0].repeated(2)
            mixes.append(block[3])
        for layer in mixes:
            if isinstance(layer, nn.Conv2d):
                weight = layer.weight[:, :, 0, 0]
                layer.weight = nn.Parameter(torch.block_diag(weight, weight)[:, :, None, None], requires_grad=False)
                assert layer.bias is not None
                layer.bias = nn.Parameter(layer.bias.repeat(2), requires_grad=False)

    def forward(self, features: Tensor, context: Tensor | None) -> list[Tensor]:
        """Features [B, C, H, W], what the coarser scale adds to their first convolution [B, hidden, h, w] -> the hidden
        channels [B, hidden, H, W] whose `output` is the prediction, in one part or two."""
        x = self.block1[0](features)
        if context is not None:
            x = x + upsample(context, x, products=x.dtype == torch.float16)
        if self.as_channels:
            x = x.permute(2, 3, 0, 1).flatten(2).permute(2, 0, 1).unsqueeze(0)
        start = self.block1[1:](x)
        hidden = self.hidden_blocks(start)
        return [hidden + start] if len(self.output) == 1 else [hidden, start]


class Decoder(nn.Module):
    """Refiners by stride, coarse to fine. Keys: layers.STRIDE.*; load, fold the batch norms, then call `fold`."""

    def __init__(self, widths: dict[int, tuple[int, int, int]], predictions: int, blocks: int) -> None:
        """widths: stride -> (input, hidden, context channels)."""
        super().__init__()
        self.strides = sorted(widths, reverse=True)
        self.predictions = predictions
        self.layers = nn.ModuleDict(
            {
                str(stride): Refiner(inputs, hidden, context, predictions, blocks)
                for stride, (inputs, hidden, context) in widths.items()
            }
        )

    def forward(self, features: dict[int, Tensor]) -> dict[int, list[Tensor]]:
        """Features by stride -> the parts of the hidden channels by stride; `predict` makes predictions of them."""
        found: dict[int, list[Tensor]] = {}
        context: Tensor | None = None
        for stride in self.strides:
            found[stride] = self.refiner(stride)(features[stride], context)
            if stride != self.strides[-1]:
                context = self.carry[str(stride)](found[stride][0])
        return found

    def predict(self, stride: int, parts: list[Tensor]) -> Tensor:
        """The prediction [B, P, H, W] that one scale adds."""
        layers = self.refiner(stride).output
        first, *rest = (layer(part) for layer, part in zip(layers, parts, strict=True))
        return first.float() + rest[0].float() if rest else first

    def refiner(self, stride: int) -> Refiner:
        """The refiner of a stride."""
        refiner = self.layers[str(stride)]
        assert isinstance(refiner, Refiner)
        return refiner

    @torch.no_grad()
    def fold(self) -> None:
        """Make it ready to run; call once, in eval mode, with the batch norms folded.

        From the context's channels of `out_conv` to those of the next scale's first convolution everything is linear,
        and so is the upsampling in between: the two 1x1 convolutions become one, before the upsampling, and nothing is
        concatenated. The published division of the residual sum by 1.4 goes into `out_conv`.
        """
        carry = {}
        for stride in self.strides:
            self.refiner(stride).out_conv.weight.div_(1.4)
        for stride, finer in zip(self.strides, self.strides[1:], strict=False):
            out, first = self.refiner(stride).out_conv, self.refiner(finer).block1[0]
            assert isinstance(first, nn.Conv2d) and out.bias is not None
            weight, bias = out.weight[self.predictions :, :, 0, 0].double(), out.bias[self.predictions :].double()
            reads = first.weight[:, -len(bias) :, 0, 0].double()
            carry[str(stride)] = _conv1x1(reads @ weight, reads @ bias)
            self.refiner(finer).block1[0] = _conv1x1(first.weight[:, : -len(bias), 0, 0], first.bias)
        for stride in self.strides:
            for block in self.refiner(stride).hidden_blocks:
                shift_bias(block)
            out = self.refiner(stride).out_conv
            assert out.bias is not None
            kept = _conv1x1(out.weight[: self.predictions, :, 0, 0], out.bias[: self.predictions])
            self.refiner(stride).output = nn.ModuleList([kept])
            del self.refiner(stride).out_conv
        self.carry = nn.ModuleDict(carry)
        # At the finest scale nothing but the output reads the last 1x1 convolution, so the two are one, and the
        # residual connection is an output of its own.
        finest = self.refiner(self.strides[-1])
        last = finest.hidden_blocks[-1]
        residual = finest.output[0]
        assert isinstance(last, nn.Sequential) and isinstance(residual, nn.Conv2d)
        mix = last[3]
        assert isinstance(mix, nn.Conv2d) and mix.bias is not None and residual.bias is not None
        weight, before = residual.weight[:, :, 0, 0].double(), mix.weight[:, :, 0, 0].double()
        finest.output.insert(0, _conv1x1(weight @ before, weight @ mix.bias.double() + residual.bias))
        residual.bias = None
        last[3] = nn.Identity()


@torch.no_grad()
def shift_bias(block: nn.Module) -> None:
    """Move the bias of the depthwise convolution of a block into the 1x1 convolution after it: see BoundedDepthwise."""
    assert isinstance(block, nn.Sequential)
    depthwise, mix = block[0], block[3]
    assert isinstance(depthwise, nn.Conv2d) and isinstance(mix, nn.Conv2d) and isinstance(block[2], nn.ReLU)
    assert depthwise.bias is not None and mix.bias is not None
    mix.bias.add_((mix.weight[:, :, 0, 0].double() @ depthwise.bias.double()).to(mix.bias.dtype))
    block[0], block[2] = BoundedDepthwise(depthwise.weight, -depthwise.bias), nn.Identity()


def upsample(x: Tensor, like: Tensor, *, products: bool) -> Tensor:
    """Bilinear, to the size of `like`, pixel edges aligned. products: by products with matrices, if that size is
    fixed: see upsampling.py."""
    height, width = like.shape[2:]
    if products and isinstance(height, int) and isinstance(width, int):
        return upsampled_sum([x], (height, width), align_corners=False)
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def _block(inputs: int, outputs: int, *, depthwise: bool) -> nn.Sequential:
    first = nn.Conv2d(inputs, outputs, 5, padding=2, groups=inputs) if depthwise else nn.Conv2d(inputs, outputs, 1)
    return nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 1))


def _conv1x1(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    assert bias is not None
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    convolution.weight = nn.Parameter(weight[:, :, None, None].float().clone(), requires_grad=False)
    convolution.bias = nn.Parameter(bias.float().clone(), requires_grad=False)
    return convolution
