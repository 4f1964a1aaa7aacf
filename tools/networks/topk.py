"""The K largest of many values, for any K, in operators that every runtime accepts.

TensorRT takes at most 3840 elements from one TopK, and a TopK over all pixels of an image is slow on a GPU.
Three exact reformulations:

- passes: take 3840, overwrite what was taken with minus infinity (ScatterElements without a reduction), take again;
- blocks: any of the K largest values lies in one of the K blocks with the largest maxima, so the K best blocks
  hold them all, and only those K blocks are searched;
- rows: the K best of each of a few rows, then the K best of those. ONNX Runtime's TopK has one thread block to a row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PASS_LIMIT = 3840  # TensorRT's limit on K of one TopK
# Finite: minus infinity times a zero mask would be NaN.
ABSENT = -1e20  # fills up what is too short; above TAKEN, so that it is preferred to taking a value twice
TAKEN = -1e30


def topk(values: Tensor, k: int, *, limit: int = PASS_LIMIT, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """The `k` largest along the last axis, best first if `ordered`, taking at most `limit` in one TopK.

    Args:
        values: [..., N] with N >= k and every value at least `ABSENT`.
        k: how many; fixed in the graph.
        limit: the largest K that one TopK may have.

    Returns:
        values [..., k], indices [..., k] (int64), no index twice.
    """
    # ONNX Runtime takes as long to sort 3840 values as to find them among 10,000: it need not where nobody wants that.
    if k <= limit:
        count = values.shape[-1]
        rows = _rows(count, k) if isinstance(count, int) else 1
        if rows > 1:
            return _topk_rows(values, k, rows, ordered)
        best = torch.topk(values, k, dim=-1, sorted=ordered)
        return best.values, best.indices
    passes = math.ceil(k / limit)
    found = []
    for number in range(passes):
        size = min(limit, k - number * limit)
        best = torch.topk(values, size, dim=-1, sorted=ordered)
        found.append((best.values, best.indices))
        if number + 1 < passes:
            values = values.scatter(-1, best.indices, torch.full_like(best.values, TAKEN))
    return torch.cat([v for v, _ in found], dim=-1), torch.cat([i for _, i in found], dim=-1)


def topk_blocks(
    values: Tensor, k: int, *, block: int, limit: int = PASS_LIMIT, ordered: bool = True
) -> tuple[Tensor, Tensor]:
    """`topk` over few blocks instead of all values: the same result where no two values are equal.

    Worth it where N is much larger than k * block. N need not be a multiple of `block`, nor as large as k.

    Args:
        values: [B, N], every value above `ABSENT`.
        k: how many.
        block: how many neighbours make one block; sqrt(N / k) gives the least work.

    Returns:
        values [B, k], indices [B, k] (int64). Where N < k the surplus has value `ABSENT` and index 0.
    """
    batch, count = values.shape
    whole = max(math.ceil(count / block), k) * block if isinstance(count, int) else None
    surplus = (k + 1) * block - 1 if whole is None else whole - count  # a dynamic N may be 0: k whole blocks always
    padded = F.pad(values, (0, surplus), value=ABSENT)
    blocks = padded.shape[1] // block
    table = padded[:, : blocks * block].reshape(batch, blocks, block)
    row = padded.reshape(batch, 1, -1, 1).permute(0, 3, 1, 2)  # see maxima.py for this and for the pooling
    highest = F.max_pool2d(row, (1, block), stride=(1, block)).permute(0, 2, 3, 1).flatten(1)
    _, chosen = topk(highest, k, limit=limit, ordered=False)
    candidates = table.gather(1, chosen.unsqueeze(2).expand(-1, -1, block)).reshape(batch, k * block)
    best, slot = topk(candidates, k, limit=limit, ordered=ordered)
    within, place = quotient(slot, block)
    index = chosen.gather(1, within) * block + place
    return best, torch.where(best > ABSENT, index, torch.zeros_like(index))


def quotient(index: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of int64 indices >= 0.

    By a division that rounds to zero, which ONNX has, not down, which it has not: // exports as seven operators.
    """
    if torch.onnx.is_in_onnx_export():
        by = torch.full((), divisor, dtype=torch.int64, device=index.device)
        result = torch.onnx.ops.symbolic("Div", (index, by), dtype=index.dtype, shape=index.shape)
        assert isinstance(result, Tensor)
    else:
        result = torch.div(index, divisor, rounding_mode="trunc")
    return result, index - result * divisor


def _topk_rows(values: Tensor, k: int, rows: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """`topk` of [..., N] in two steps; `rows` divides N."""
    # The first step need not be in order: on an H200 2048 of each of 5 x 8640 take 52 us instead of 68.
    first = torch.topk(values.unflatten(-1, (rows, -1)), k, dim=-1, sorted=False)
    starts = torch.arange(rows, device=values.device).unsqueeze(1) * (values.shape[-1] // rows)
    best = torch.topk(first.values.flatten(-2), k, dim=-1, sorted=ordered)
    return best.values, (first.indices + starts).flatten(-2).gather(-1, best.indices)


def _rows(count: int, k: int) -> int:
    """Into how many rows to cut `count` values: measured on an H200, a TopK takes 25 us and 3 us for 1000 of a row."""
    costs = {rows: 25 + 0.003 * (count / rows + rows * k) for rows in range(2, 17) if count % rows == 0}
    rows = min((rows for rows in costs if count // rows >= k), key=costs.__getitem__, default=1)
    return rows if rows > 1 and costs[rows] < 0.003 * count else 1
