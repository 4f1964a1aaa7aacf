"""VGG-19 with batch norm up to its fourth pooling: the fine features of RoMa and DeDoDe.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015. The layers are
numbered as in torchvision's `vgg19_bn().features[:40]`, which is how every published checkpoint names them.
"""

from __future__ import annotations

import torch
from torch import nn

from matchanything_tools.networks.stripes import striped

WIDTHS: tuple[int | None, ...] = (64, 64, None, 128, 128, None, *4 * (256,), None, *4 * (512,), None)  # None: pooling


class VGG19(nn.Module):
    """Image [B, 3, H, W] -> features of strides 1, 2, 4, 8 with 64, 128, 256, 512 channels.

    Odd sizes are halved downwards, as pooling does. Load the weights, call eval(), then `fold_batch_norms`.
    """

    strides = (1, 2, 4, 8)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for wanted in WIDTHS:
            if wanted is None:
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(width, wanted, 3, padding=1), nn.BatchNorm2d(wanted), nn.ReLU()]
                width = wanted
        self.layers = nn.Sequential(*layers)

    def stripe(self, width: int = 8) -> VGG19:
        """Run the first convolution over stripes (see stripes.py) of images of this width; for fp16, norms folded."""
        self.layers[0] = striped(self.layers[0], width, planes=True)
        return self

    def forward(self, image: torch.Tensor) -> dict[int, torch.Tensor]:
        """Features by stride: what enters each pooling. The last pooling itself is never needed."""
        features: dict[int, torch.Tensor] = {}
        x = image
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                features[self.strides[len(features)]] = x
                if len(features) == len(self.strides):
                    break
            x = layer(x)
        return features
