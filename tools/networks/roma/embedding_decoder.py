"""The transformer decoder of RoMa: each token classified among 64 x 64 anchors of the other image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from matchanything_tools.networks.attention import Block, run_blocks
from matchanything_tools.networks.roma.grids import pixel_grid

WIDTH, HEADS, DEPTH = 1024, 8, 5
ANCHORS = 64  # on each side


class EmbeddingDecoder(nn.Module):
    """Posterior and features, both [B, N, 512] -> anchor logits [B, N, 4096] and certainty logit [B, N, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, bias=False) for _ in range(DEPTH))
        self.to_out = nn.Linear(WIDTH, ANCHORS * ANCHORS + 1)

    def forward(self, posterior: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = run_blocks(torch.cat((posterior, features), 2), self.blocks, None)
        # Two products: one of odd width would miss the tensor cores. Certainty is a final head: fp32.
        weight, bias = self.to_out.weight, self.to_out.bias
        logits = F.linear(x, weight[:-1].to(x.dtype), bias[:-1].to(x.dtype))
        certainty = F.linear(x.float(), weight[-1:], bias[-1:])
        return logits, certainty


def decode_anchors(logits: torch.Tensor) -> torch.Tensor:
    """Anchor logits [B, N, 4096] -> flow [B, N, 2], normalised (x, y): the mean of the best anchor and its neighbours.

    As trained, the neighbours are index - 1, + 1, - 64, + 64, clamped to the table: at the border of the grid "left" is
    the end of the row above, and a clamped index counts twice. The weights are softmax probabilities, whose common
    denominator cancels.
    """
    best = logits.argmax(2, keepdim=True)
    steps = torch.tensor([-1, 0, 1, -ANCHORS, ANCHORS])
    index = (best + steps).clamp(0, ANCHORS * ANCHORS - 1)
    around = logits.gather(2, index).float()
    weights = torch.exp(around - around[..., 1:2])
    table = pixel_grid(ANCHORS, ANCHORS).flatten(2)[0].T
    return (weights[..., None] * F.embedding(index, table)).sum(2) / weights.sum(2, keepdim=True)
