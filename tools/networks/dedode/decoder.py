"""The coarse-to-fine decoder of DeDoDe: features of several strides -> predictions that are summed over the scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Refiner(nn.Module):
    """One scale: a full 1x1 block, depthwise 5x5 blocks, a residual connection over them, and a 1x1 output.

    The first `predictions` output channels are the prediction, the others are context for the next scale.
    """

    def __init__(self, in_channels: int, hidden: int, context: int, predictions: int, blocks: int) -> None:
        super().__init__()
        self.predictions = predictions
        self.block1 = _block(in_channels, hidden, depthwise=False)
        self.hidden_blocks = nn.Sequential(*(_block(hidden, hidden, depthwise=True) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(hidden, predictions + context, 1)

    def hidden(self, x: Tensor) -> Tensor:
        """What `out_conv` reads."""
        start = self.block1(x)
        return self.hidden_blocks(start) + start

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, in_channels, H, W] -> prediction [B, predictions, H, W], context [B, context, H, W]."""
        out = self.out_conv(self.hidden(x))
        return out[:, : self.predictions], out[:, self.predictions :]

    @torch.no_grad()
    def fold(self) -> None:
        """Move the published division of the residual sum by 1.4 into `out_conv`; call once, after loading."""
        self.out_conv.weight.div_(1.4)


class Decoder(nn.Module):
    """Refiners by stride, coarse to fine. Keys: layers.STRIDE.*"""

    def __init__(self, widths: dict[int, tuple[int, int, int]], predictions: int, blocks: int, mode: str) -> None:
        """widths: stride -> (input, hidden, context channels). mode: how predictions go to the next finer scale."""
        super().__init__()
        self.strides = sorted(widths, reverse=True)
        self.mode = mode
        self.layers = nn.ModuleDict(
            {
                str(s): Refiner(inputs, hidden, context, predictions, blocks)
                for s, (inputs, hidden, context) in widths.items()
            }
        )

    def forward(self, features: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Features by stride -> sum of the predictions of all but the finest scale, at the finest but one [B, P, H, W]
        float32, and the input of the finest refiner (which those who sample it need at a few pixels only)."""
        total: Tensor | None = None
        context: Tensor | None = None
        for stride in self.strides:
            x = features[stride]
            if context is not None:
                x = torch.cat((x, resize(context, x, "bilinear")), dim=1)
            if stride == self.strides[-1]:
                assert total is not None
                return total, x
            prediction, context = self.layers[str(stride)](x)
            prediction = prediction.float()
            total = prediction if total is None else prediction + resize(total, prediction, self.mode)
        raise AssertionError("no strides")

    def finest(self) -> Refiner:
        """The refiner of full resolution."""
        refiner = self.layers[str(self.strides[-1])]
        assert isinstance(refiner, Refiner)
        return refiner

    def fold(self) -> None:
        """See Refiner.fold."""
        for refiner in self.layers.values():
            refiner.fold()  # type: ignore[operator]


def resize(x: Tensor, like: Tensor, mode: str) -> Tensor:
    """Resize to the size of `like`, pixel edges aligned; bicubic with a = -0.75, no antialiasing."""
    return F.interpolate(x, size=like.shape[2:], mode=mode, align_corners=False)


def _block(inputs: int, outputs: int, *, depthwise: bool) -> nn.Sequential:
    first = nn.Conv2d(inputs, outputs, 5, padding=2, groups=inputs) if depthwise else nn.Conv2d(inputs, outputs, 1)
    return nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 1))
