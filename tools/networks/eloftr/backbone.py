"""RepVGG-A1 (Ding et al., CVPR 2021), the backbone of EfficientLoFTR: as trained, and fused to plain convolutions."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from matchanything_tools.networks.stripes import StripedConv


class RepVGGBlock(nn.Module):
    """relu(BN(conv3x3) + BN(conv1x1) + BN(x)); the identity branch exists where input and output have one shape.

    Attribute names are the published keys.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.rbr_dense = _conv_bn(channels_in, channels, 3, stride)
        self.rbr_1x1 = _conv_bn(channels_in, channels, 1, stride)
        self.rbr_identity = nn.BatchNorm2d(channels) if stride == 1 and channels_in == channels else None

    def forward(self, x: Tensor) -> Tensor:
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.relu(total if self.rbr_identity is None else total + self.rbr_identity(x))

    def fused(self) -> nn.Sequential:
        """One 3x3 convolution with bias and a ReLU that compute the same (in evaluation mode)."""
        kernel, bias = self._folded(self.rbr_dense)
        point, point_bias = self._folded(self.rbr_1x1)
        kernel, bias = kernel + F.pad(point, (1, 1, 1, 1)), bias + point_bias
        if self.rbr_identity is not None:
            channels = kernel.shape[0]
            unit = torch.eye(channels, dtype=torch.float64).reshape(channels, channels, 1, 1)
            same, same_bias = fold_batch_norm(unit, self.rbr_identity)
            kernel, bias = kernel + F.pad(same, (1, 1, 1, 1)), bias + same_bias
        return nn.Sequential(conv_from(kernel, bias, stride=self.stride), nn.ReLU())

    @staticmethod
    def _folded(branch: nn.Sequential) -> tuple[Tensor, Tensor]:
        conv, norm = branch
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        return fold_batch_norm(conv.weight, norm)


class RepVGG(nn.Module):
    """gray image [B, 1, H, W] -> features at 1/2 (64 channels), 1/4 (128) and 1/8 (256)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer0: nn.Module = RepVGGBlock(1, 64, 2)
        self.layer1 = _stage(64, 64, 2, 1)
        self.layer2 = _stage(64, 128, 4, 2)
        self.layer3 = _stage(128, 256, 14, 2)

    def forward(
        self, image: Tensor, below: int = 0, right: int = 0, cut: tuple[bool, bool] = (False, False)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """below, right: pixels of zeros to be added to the image. cut: whether they are but the first of many, so that
        every convolution (fused) leaves out its last row, or column, which would see the others."""
        if isinstance(self.layer0, StripedConv):
            first = F.relu(self.layer0(image, below, right))
        else:
            first = self.layer0(F.pad(image, (0, right, 0, below)))
        half = _run(self.layer1, first, cut)
        quarter = _run(self.layer2, half, cut)
        return half, quarter, _run(self.layer3, quarter, cut)

    def fuse(self, striped: bool = False) -> None:
        """Replace every block by its fused form. striped: the first one runs over stripes."""
        assert isinstance(self.layer0, RepVGGBlock)
        first = self.layer0.fused()
        self.layer0 = StripedConv(first[0], 8, planes=True) if striped else first
        for name in ("layer1", "layer2", "layer3"):
            setattr(self, name, nn.Sequential(*(block.fused() for block in getattr(self, name))))


def fold_batch_norm(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias (float64) of the bias-free convolution `weight` followed by `norm` in evaluation mode."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight.double() * scale.reshape(-1, 1, 1, 1), norm.bias.double() - norm.running_mean.double() * scale


def conv_from(weight: Tensor, bias: Tensor | None, stride: int = 1) -> nn.Conv2d:
    """A float32 convolution that keeps the size (or divides it by the stride) with these parameters."""
    channels, channels_in, size, _ = weight.shape
    conv = nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return conv


def _run(stage: nn.Module, x: Tensor, cut: tuple[bool, bool]) -> Tensor:
    """A stage of the backbone; see RepVGG.forward."""
    if not any(cut):
        result: Tensor = stage(x)
        return result
    below, right = (0 if left_out else 1 for left_out in cut)
    for block in stage.children():
        conv = block.get_submodule("0")
        assert isinstance(conv, nn.Conv2d)
        same = conv.stride == (1, 1)
        x = F.relu(F.conv2d(F.pad(x, (1, right, 1, below)), conv.weight, conv.bias) if same else conv(x))
    return x


def _conv_bn(channels_in: int, channels: int, size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels)))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = RepVGGBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(RepVGGBlock(channels, channels, 1) for _ in range(blocks - 1)))
