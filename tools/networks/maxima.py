"""Maxima of fixed-size tensors by max pooling.

For ReduceMax, ONNX Runtime takes the general reduction of cuDNN on CUDA, slow over long or inner axes, and its list of
CUDA kernels names no ReduceMax of opset 20. Pooling is the same maximum, and every runtime has fast kernels for it.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def largest(x: Tensor, axis: int) -> Tensor:
    """Maximum of [H, W] or [B, H, W] along `axis` (-1 or -2), which stays with size 1.

    A long axis is reduced in two or three steps, so that many threads share it. A dynamic axis is reduced by ReduceMax.
    """
    length = x.shape[axis]
    if not isinstance(length, int):
        return x.amax(dim=axis, keepdim=True)
    # One channel, or each column one, which is said to be the last in memory: so ONNX Runtime need not copy a large
    # matrix to make it so.
    shape = (-1, length, 1, x.shape[-1]) if axis == -2 else (-1, x.shape[-2], length, 1)
    planes = x.reshape(shape).permute(0, 3, 1, 2)
    steps = 1 if length <= 64 else 2 if length <= 256 else 3
    for left in range(steps, 0, -1):
        # The first of several is larger: 19 us instead of 26 for the columns of 2000 x 2000 on an H200.
        step = math.ceil((4 if left == 3 else 1) ** (1 / 3) * planes.shape[axis] ** (1 / left))
        window = (1, step) if axis == -1 else (step, 1)
        planes = F.max_pool2d(planes, window, stride=window, ceil_mode=True)
    result = planes.permute(0, 2, 3, 1)
    return result.reshape(*x.shape[:-2], *((1, x.shape[-1]) if axis == -2 else (x.shape[-2], 1)))
