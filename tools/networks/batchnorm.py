"""Batch norms folded into the convolutions before them: what is exported has none."""

from __future__ import annotations

import torch
from torch import nn


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold every BatchNorm2d that follows a Conv2d in an nn.Sequential into that convolution, in place.

    The module must be in eval mode and have its weights. A folded norm becomes nn.Identity, so that the positions
    of the others stay what the checkpoint calls them. Computed in float64: the result differs by rounding only.
    """
    if module.training:
        raise RuntimeError("batch norms can be folded in eval mode only")
    for child in module.modules():
        if not isinstance(child, nn.Sequential):
            continue
        for index in range(1, len(child)):
            convolution, norm = child[index - 1], child[index]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                _fold(convolution, norm)
                child[index] = nn.Identity()
    return module


@torch.no_grad()
def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = torch.zeros_like(scale) if convolution.bias is None else convolution.bias.double()
    weight = convolution.weight.double() * scale[:, None, None, None]
    bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
    convolution.weight = nn.Parameter(weight.to(convolution.weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(convolution.weight.dtype), requires_grad=False)
